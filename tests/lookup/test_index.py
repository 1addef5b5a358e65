"""The index against a search of the whole text, and its bounds on adversarial text."""

import random
from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.copying.index import GAP, MAX_CANDIDATES, MAX_MATCH, MAX_STEPS, SuffixIndex

TEXTS = st.lists(st.integers(0, 3), max_size=60)


def occurrences(text: Sequence[int], suffix: Sequence[int], *, own: bool) -> dict[int, int]:
    """Source of every occurrence of the suffix's last token → length of the match, searched in every place."""
    found = {}
    for place in range(len(text) - own):
        length = 0
        while length <= place and length < min(len(suffix), MAX_MATCH):
            if text[place - length] != suffix[-1 - length]:
                break
            length += 1
        if length:
            found[place + 1] = length
    return found


def newest(found: dict[int, int]) -> list[tuple[int, int]]:
    """(length, source) of the places that a query keeps."""
    wanted = {source: length for source, length in found.items() if length > 1} or found
    return [(wanted[source], source) for source in sorted(wanted, reverse=True)[:MAX_CANDIDATES]]


@settings(deadline=None, max_examples=300)
@given(TEXTS, st.lists(st.integers(1, 7), max_size=12))
def test_own_text_however_it_was_appended(text: list[int], cuts: list[int]) -> None:
    index, at = SuffixIndex(), 0
    for cut in [*cuts, len(text)]:
        index.extend(text[at : at + cut])
        at += cut
    assert len(index) == len(text)
    assert [place[:2] for place in index.places()] == newest(occurrences(text, text, own=True))


@settings(deadline=None, max_examples=300)
@given(st.lists(TEXTS, max_size=4), TEXTS)
def test_other_texts(texts: list[list[int]], suffix: list[int]) -> None:
    index = SuffixIndex(growing=False)
    for text in texts:
        index.extend([*text, GAP])
    joined = [token for text in texts for token in (*text, GAP)]
    found = index.places_of(suffix)
    assert [place[:2] for place in found] == newest(occurrences(joined, suffix, own=False))
    for place in found:
        ahead = list(index.continuation(place.source, 8))
        assert GAP not in ahead
        assert ahead == joined[place.source : place.source + len(ahead)]
        assert len(ahead) == 8 or joined[place.source + len(ahead)] == GAP


def test_large_ids_and_growth_beyond_the_first_tables() -> None:
    rng = random.Random(3)
    text = [rng.randrange(200_000) for _ in range(700)]
    text += text[100:130]
    place = SuffixIndex(text).places()[0]
    assert (place.length, place.source) == (30, 130)
    assert list(place.text.continuation(place.source, 3)) == text[130:133]


def test_a_repeated_unit_continues_itself() -> None:
    place = SuffixIndex([5, 6, 7] * 4).places()[0]
    assert list(place.text.continuation(place.source, 7)) == [5, 6, 7, 5, 6, 7, 5]


def de_bruijn(symbols: int) -> list[int]:
    """Every pair of symbols once, by walking all edges of the complete graph (Hierholzer)."""
    ahead = {a: list(range(symbols)) for a in range(symbols)}
    stack, tour = [0], []
    while stack:
        if ahead[stack[-1]]:
            stack.append(ahead[stack[-1]].pop())
        else:
            tour.append(stack.pop())
    return tour[::-1]


ADVERSARIAL = {
    "one token 8,000 times": [7] * 8000,
    "de Bruijn sequence, 90 symbols": de_bruijn(90),
    "three symbols at random": [random.Random(0).randrange(3) for _ in range(4000)],
    "all in one chain": [a << 20 for pair in product(range(60), repeat=2) for a in pair],
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_reads_of_a_query_are_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that a query reads, counted, at every hundredth length of the text."""
    reads = 0

    class Counted(list[int]):
        def __getitem__(self, i):  # type: ignore[no-untyped-def,override]
            nonlocal reads
            reads += 1
            return super().__getitem__(i)

    text = ADVERSARIAL[name]
    index = SuffixIndex(text)
    index._tokens = Counted(text)  # type: ignore[assignment]
    for _ in range(2):
        for end in range(1, len(text), 100):
            reads = 0
            index._follow(
                index._two_before[end], index._one_before[end], Counted(text[max(0, end - 40) : end + 1])
            )
            assert reads <= 1 + 3 * 2 * MAX_STEPS + 2 * MAX_CANDIDATES * MAX_MATCH


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_links_of_an_append_are_linear(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places linked for a text that arrives token by token: at most three for each, rebuilt tables included."""
    linked = 0
    link = SuffixIndex._link

    def counting(self: SuffixIndex, start: int) -> None:
        nonlocal linked
        linked += len(self) - start
        link(self, start)

    monkeypatch.setattr(SuffixIndex, "_link", counting)
    index = SuffixIndex()
    for token in ADVERSARIAL[name]:
        index.extend([token])
    assert linked <= 3 * len(index)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_bytes_of_a_token_are_bounded(name: str) -> None:
    text = ADVERSARIAL[name]
    assert SuffixIndex(text).nbytes / len(text) < 32
    slowly = SuffixIndex()
    for token in text:
        slowly.extend([token])
    assert slowly.nbytes / len(text) < 32

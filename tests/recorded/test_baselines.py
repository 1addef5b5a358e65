"""Prompt lookup and SuffixDecoding against their definitions, searched in the whole text."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whiflash_sglang.lab.recorded.peers import PromptLookup, SuffixDecoding

TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def looked_up(text: Sequence[int], ngram: int, count: int) -> list[int]:
    """The published loop: the longest n-gram, the first place that something follows."""
    for n in range(min(ngram, len(text) - 1), 0, -1):
        for start in range(len(text) - n):
            if text[start : start + n] == text[-n:]:
                return list(text[start + n : start + n + count])
    return []


@settings(deadline=None, max_examples=300)
@given(TEXT, st.integers(1, 4), st.integers(1, 12), st.integers(1, 5))
def test_prompt_lookup(text: list[int], ngram: int, count: int, cut: int) -> None:
    state = PromptLookup(ngram, count)
    state.extend(text[:cut])
    state.extend(text[cut:])
    assert list(state.propose()) == looked_up(text, ngram, count)


def test_prompt_lookup_copies_from_the_first_place() -> None:
    state = PromptLookup()
    state.extend([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3])
    assert state.propose()[0] == 7


Path = tuple[int, ...]


def counted(texts: Sequence[Sequence[int]], depth: int) -> Counter[Path]:
    """Count of every node of the suffix tree: how often each run of at most `depth` tokens occurs."""
    return Counter(
        tuple(text[i:j])
        for text in texts
        for i in range(len(text))
        for j in range(i + 1, min(len(text), i + depth) + 1)
    )


def last_seen(texts: Sequence[Sequence[int]], path: Path) -> tuple[int, int]:
    """The text and place where a run occurs last."""
    return max(
        (index, start)
        for index, text in enumerate(texts)
        for start in range(len(text) - len(path) + 1)
        if tuple(text[start : start + len(path)]) == path
    )


def speculated(
    texts: Sequence[Sequence[int]], end: Sequence[int], depth: int, factor: float, min_prob: float
) -> tuple[list[int], float]:
    """SuffixDecoding's rule on one tree, with all of its nodes written out."""
    nodes = counted(texts, depth)
    best: tuple[list[int], float] = ([], 0.0)
    for length in range(1, min(len(end), depth - 1) + 1):
        pattern = tuple(end[-length:])
        if pattern not in nodes:
            break
        drafts: list[int] = []
        probability, score = 1.0, 0.0
        while len(drafts) < min(int(length * factor + 1e-6), depth - length):
            node = (*pattern, *drafts)
            children = [path for path in nodes if len(path) == len(node) + 1 and path[:-1] == node]
            if not children:
                break
            child = max(children, key=lambda path: (nodes[path], last_seen(texts, path)))
            probability *= nodes[child] / nodes[node]
            if probability < min_prob:
                break
            drafts.append(child[-1])
            score += probability
        if score >= best[1]:
            best = (drafts, score)
    return best


@settings(deadline=None, max_examples=250)
@given(
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    st.integers(2, 9),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.integers(0, 2),
)
# The request's own tree scores 3/5, the other one 2/5 + 1/5, which is more as a sum of floats.
@example([([0], [1, 1, 0, 0, 1, 1]), ([0], [1, 1, 0, 1, 1, 1])], 4, 1.0, 0.0, 1)
def test_suffix_decoding(
    requests: list[tuple[list[int], list[int]]], depth: int, factor: float, min_prob: float, keep: int
) -> None:
    state = SuffixDecoding(depth, factor, min_prob, cached_requests=keep)
    for prompt, answer in requests:
        state.begin(prompt)
        state.extend(answer[:1])
        state.extend(answer[1:])
    prompt, answer = requests[-1]
    own = speculated([prompt + answer], prompt + answer, depth, factor, min_prob)
    kept = [answer for _, answer in requests[-keep - 1 :]] if keep else []
    other = speculated(kept, prompt + answer, depth, factor, min_prob)
    # The same sums in the same order: a tolerance here would call a tie what rounding makes none.
    wanted, score = own if own[1] >= other[1] else other
    assert list(state.propose()) == wanted, score


def test_the_most_frequent_continuation_wins_and_the_newest_of_equals() -> None:
    state = SuffixDecoding()
    state.begin([1, 2, 5, 1, 2, 6, 1, 2, 6, 1, 2])
    assert state.propose()[0] == 6
    state.begin([1, 2, 5, 9, 1, 2, 6, 9, 1, 2])
    assert state.propose()[0] == 6


def test_no_wider_than_the_match_is_long() -> None:
    state = SuffixDecoding()
    state.begin([7, 1, 2, 3, 4, 5, 6, 8, 1, 2])
    assert list(state.propose()) == [3, 4]


@pytest.mark.parametrize(("keep", "drafts"), [(0, []), (1, [])])
def test_requests_beyond_those_kept_are_forgotten(keep: int, drafts: list[int]) -> None:
    state = SuffixDecoding(cached_requests=keep)
    for answer in ([1, 2, 3, 4], [5], [6]):
        state.begin([])
        state.extend(answer)
    state.begin([1, 2])
    assert list(state.propose()) == drafts
    state = SuffixDecoding(cached_requests=3)
    for answer in ([1, 2, 3, 4], [5], [6]):
        state.begin([])
        state.extend(answer)
    state.begin([1, 2])
    assert list(state.propose()) == [3, 4]


def test_a_conversation_that_goes_on_is_a_new_request_with_a_longer_prompt() -> None:
    whole, on = SuffixDecoding(), SuffixDecoding()
    for state in (whole, on):
        state.begin([1, 2, 3])
        state.extend([4, 5])
    whole.begin([1, 2, 3, 4, 5, 6, 1, 2])
    on.go_on([6, 1, 2])
    for state in (whole, on):
        state.extend([3])
    assert list(whole.text) == list(on.text)
    assert list(whole.propose()) == list(on.propose()) != []

"""Emission forms: what they say, that copies from them are token-exact, and what they may cost."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.lookup import forms as forms_module
from whiflash_sglang.lookup.calibration import EVEN_ODDS, MatchCalibration
from whiflash_sglang.lookup.copier import FORM_MATCH, Copier
from whiflash_sglang.lookup.forms import (
    HITS,
    NEEDLE,
    SHORTEST,
    WINDOW,
    Dress,
    Encode,
    Forms,
    Written,
    escaped,
)
from whiflash_sglang.lookup.index import GAP, SuffixIndex
from whiflash_sglang.lookup.readings import (
    STEP,
    Reading,
    meant,
    pieces_of,
    readings,
    undiffed,
    unescaped,
    unnumbered,
)

BUDGET = 1 << 15
SOURCE = 'def total(rows):\n    """Sum of "rows"."""\n    return sum(row.amount for row in rows)\n'


def encode(text: str) -> list[int]:
    """Code points as tokens: a real tokenizer is walked in `tests/recorded`."""
    return [ord(char) for char in text]


@given(st.text())
def test_escaping_is_json_s_and_comes_back(text: str) -> None:
    assert json.loads(f'"{escaped(text)}"') == text
    found = unescaped(json.dumps({"output": text}))
    assert found is None or found == text
    if "\n" in text or '"' in text or "\\" in text or "\t" in text:
        assert found == text


def test_a_listing_without_its_numbers() -> None:
    lines = SOURCE.splitlines()
    for listing in (
        "\n".join(f"{n}:{line}" for n, line in enumerate(lines, 98)),
        "\n".join(f"{n:6}\t{line}" for n, line in enumerate(lines, 1)),
        "\n".join(f"{n:6}|{line}" for n, line in enumerate(lines, 1)),
        "\n".join(f"{n}-{line}" for n, line in enumerate(lines, 1)),
    ):
        assert unnumbered(listing) == SOURCE.rstrip("\n")
    assert unnumbered(SOURCE) is None
    assert unnumbered(f"{SOURCE}12: a note\n") is None


def test_a_diff_without_its_prefixes() -> None:
    diff = "--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,2 @@\n def f():\n-    return 1\n+    return 2\n"
    assert undiffed(diff) == "--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,2 @@\ndef f():\n    return 1\n    return 2\n"
    assert undiffed("- a list\n- of two\n") is None


def test_what_is_said_in_another_dress_is_read_without_it_first() -> None:
    assert readings("plain words") == [Reading("plain words", plain=True)]
    listing = "\n".join(f"{n}:{line}" for n, line in enumerate(SOURCE.splitlines(), 1))
    assert readings(listing) == [Reading(SOURCE.rstrip("\n")), Reading(listing, plain=True)]
    told = json.dumps({"output": listing + "\n"})
    found = [SOURCE, listing + "\n", told]
    assert [reading.text for reading in readings(told)] == found
    assert [reading.stands(inside_json=True) for reading in readings(told)] == [False, True, False]
    assert [reading.stands(inside_json=False) for reading in readings(told)] == [False, False, True]


@pytest.mark.parametrize(
    ("quoted", "said"),
    [
        (r"\ud83d\ude00!", "\U0001f600!"),
        (r"\ud83d", r"\ud83d"),
        (r"\ude00 \u00e9", "\\ude00 \u00e9"),
        (r"\ud83d\n", "\\ud83d\n"),
    ],
)
def test_an_emoji_is_two_escapes(quoted: str, said: str) -> None:
    assert meant(quoted) == said
    text = unescaped(f'{{"a": "{quoted}\\n"}}')
    assert text is not None
    text.encode()


@given(st.text(), st.text(alphabet='ab"\\\n\tu0é'))
def test_what_is_quoted_means_what_it_was(text: str, more: str) -> None:
    """A backslash before an n is no end of a line."""
    for said in (text, more):
        assert meant(escaped(said)) == said


@pytest.mark.parametrize("inside_json", [True, False])
@pytest.mark.parametrize(
    ("source", "lead", "remove", "add"),
    [
        ("    return x\n\n    more(x)", "        ", "", "    "),
        ("        return x\n\n        more(x)", "    ", "    ", ""),
        ("    return x\n\n    more(x)", "+    ", "", "+"),
        ("    return x\n\n    more(x)", "-    ", "", "-"),
        ("    return x\n\n    more(x)", "# ", "   ", "#"),
        ("+    return x\n+\n+    more(x)", "    ", "+", ""),
        ("some words\n\nmore of x", "> ", "", "> "),
        ("    return x\n\n    more(x)", "    ", "", ""),
    ],
    ids=["deeper", "out", "added", "removed", "comment", "applied", "quotation", "same"],
)
def test_a_line_that_begins_otherwise_tells_how_the_next_ones_do(
    source: str, lead: str, remove: str, add: str, inside_json: bool
) -> None:
    first, *rest = source.split("\n")
    said = first.removeprefix("+").strip()
    written = Written(f"so:\n{lead}{said}")
    text = f"def f(x):\n{source}\n"
    (needle,) = (n for n in written.needles if n == said)
    dress = written.dress(text, text.index(said), needle, inside_json=inside_json)
    assert dress == Dress(inside_json, remove, add)
    blank, last = (add + line.removeprefix(remove) for line in rest)
    expected = "\n".join([lead + said, blank.rstrip(), last])
    assert dress.on(source) == (escaped(expected) if inside_json else expected)


def test_a_place_in_the_middle_of_a_line_tells_nothing_of_its_beginning() -> None:
    text = "if done: return the_value\n"
    for end in ("so\n    return the_value", "return the_value"):
        written = Written(end)
        for needle in written.needles:
            if needle in text:
                assert written.dress(text, text.index(needle), needle, inside_json=False) == Dress(False)


def test_a_line_that_only_ends_alike_tells_nothing_of_its_beginning() -> None:
    text = "    first = the same value\n"
    written = Written("so:\n+    other = the same value")
    (needle,) = (n for n in written.needles if n in text)
    assert written.dress(text, text.index(needle), needle, inside_json=False) == Dress(False)


TABLE = [bytes([i]) for i in range(256)] + [b"<|end|>"]


def test_pieces_are_what_stands_between_special_tokens() -> None:
    prompt = [*b"first one", 256, *b"short", 256, *"zweites Stück".encode(), 300]
    assert list(pieces_of(prompt, TABLE, frozenset({256}))) == ["zweites Stück", "short", "first one"]


@pytest.mark.parametrize("line", [b"a line of it\n", b"one line without an end "])
def test_a_long_piece_is_parted_and_each_part_is_read_when_it_is_asked_for(line: bytes) -> None:
    text = line * (5 * STEP // len(line))
    pieces = pieces_of(text, read := Counted(TABLE), frozenset({256}))
    found = [next(pieces)]
    assert read.count <= 2 * STEP + len(line)
    found += pieces
    assert "".join(reversed(found)).encode() == text
    assert max(map(len, found)) <= 2 * STEP + len(line)
    assert b"\n" not in line or all(piece.startswith("\n") for piece in found[:-1])


class Counted(list[bytes]):
    """Counts what is looked up in it."""

    count = 0

    def __getitem__(self, index: Any) -> Any:
        self.count += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("mark", ["+", "-", "    ", "# "])
def test_a_file_is_copied_behind_the_mark_that_its_lines_get(mark: str) -> None:
    lines = [mark + line for line in SOURCE.splitlines()]
    begin = f"```\n{lines[0]}\n{lines[1]}"
    assert copied([SOURCE], begin, False) == f"\n{lines[2]}"[:40]
    assert copied([SOURCE], escaped(begin), True) == escaped(f"\n{lines[2]}")[:40]


NUMBERED = [("   98", "\t"), ("98", ":"), ("98", ": "), ("  98", "|"), ("   98", "→"), (" 98", "\t    ")]


@pytest.mark.parametrize("inside_json", [False, True])
@pytest.mark.parametrize(("number", "mark"), NUMBERED)
def test_a_file_is_listed_with_the_numbers_that_its_lines_get(
    number: str, mark: str, inside_json: bool
) -> None:
    """Also one that was read with other numbers, and from its middle on. They go on where they get wider, and before
    empty lines."""
    source = SOURCE + "\n    more = 1\n"
    lines = source.splitlines()
    listed = [f"{n:{len(number)}}{mark}{line}" for n, line in enumerate(lines, 98)]
    listed[3] = listed[3].rstrip(" ")
    begin, ahead = "```\n" + "\n".join(listed[:1]), "\n" + "\n".join(listed[1:])
    other = "\n".join(f"{n:6}\t{line}" for n, line in enumerate(lines, 5))
    for prompt in (source, other, 5 * "# before\n" + source):
        found = copied([prompt], escaped(begin) if inside_json else begin, inside_json, len(ahead) + 20)
        wanted = escaped(ahead) if inside_json else ahead
        assert found[: len(wanted)] == wanted[: len(found)]
        assert len(found) >= min(len(wanted), 60)


def test_what_begins_with_a_number_is_a_listing_only_where_a_mark_follows() -> None:
    for line in ("12 def total(rows):", "0:def total(rows):", "x 12:def total(rows):"):
        written = Written(f"so:\n{line}")
        needle = "def total(rows):"
        assert written.dress(SOURCE, 0, needle, inside_json=False).numbers is None


def forms_of(pieces: Sequence[str], encoded: Encode = encode, budget: int = BUDGET) -> Forms:
    return Forms(encoded, reversed(pieces), budget)


def copied(pieces: Sequence[str], written: str, inside_json: bool, most: int = 40) -> str:
    """What a request that has written this copies next, from forms and from its own prompt."""
    found = forms_of(pieces)
    copier = Copier(
        MatchCalibration(EVEN_ODDS), forms=lambda: (found.text(written, inside_json=inside_json),)
    )
    copier.extend(encode("\x00".join([*pieces, written])))
    return "".join(map(chr, copier.look(most, worth=0.0).tokens))


@pytest.mark.parametrize("inside_json", [True, False])
def test_what_is_quoted_in_json_is_copied_as_it_is_quoted(inside_json: bool) -> None:
    ahead = copied([SOURCE], '{"text": "def total(rows):', inside_json)
    wanted = escaped(SOURCE) if inside_json else SOURCE
    assert ahead == wanted.removeprefix("def total(rows):")[:40]


def test_a_listing_is_quoted_without_its_numbers() -> None:
    listing = "\n".join(f"{n:6}\t{line}" for n, line in enumerate(SOURCE.splitlines(), 1))
    assert copied([listing], "```\ndef total(rows):", False).startswith('\n    """Sum of "rows"')
    assert copied([listing], '"def total(rows):', True).startswith('\\n    \\"\\"\\"Sum of')


def test_the_newest_piece_is_found_first() -> None:
    older, newer = "price: 10\nname: \tx", "price: 10\nname: \ty"
    assert copied([older, newer], '"price: 10', True) == "\\nname: \\ty"


@pytest.mark.parametrize(("extra", "form"), [(0, True), (-1, False)])
def test_a_form_is_copied_from_only_where_much_of_it_matches(extra: int, form: bool) -> None:
    """As long a match with the text's own words loses against it; a short one is not looked at."""
    shared = list(range(FORM_MATCH + extra))
    index = SuffixIndex([*shared, 70, 71, GAP], growing=False)
    copier = Copier(MatchCalibration(EVEN_ODDS), forms=lambda: (index,))
    copier.extend([*shared, 80, 81, 99, *shared])
    assert copier.look(2, worth=0.0).tokens[0] == (70 if form else 80)
    assert copier.look_beyond([80], 1.0, 1, worth=0.0).tokens == [81]


CHARS = st.text(alphabet='ab\n"1: ', max_size=200)


@settings(deadline=None, max_examples=100)
@given(st.lists(CHARS, max_size=5), CHARS, st.booleans())
def test_only_forms_of_the_prompt_are_indexed(pieces: list[str], output: str, inside_json: bool) -> None:
    """Every indexed text lies in a form, begins where no earlier window did, and is counted."""
    seen: list[str] = []
    found = forms_of(pieces, lambda text: seen.append(text) or encode(text))  # type: ignore[func-returns-value]
    for end in range(len(output)):
        index = found.text(output[: end + 1], inside_json=inside_json)
    known = {line.strip() for piece in pieces for said in readings(piece) for line in said.text.split("\n")}
    for text in seen:
        for line in (meant(text) if inside_json else text).split("\n"):
            assert line.strip() in known or re.sub(r"^ *\d+:", "", line).strip() in known
    assert sum(map(len, seen)) == found.tokens
    if output:
        assert len(index) == sum(len(text) + 1 for text in seen)
        assert list(index.continuation(0, WINDOW)) == (encode(seen[0]) if seen else [])
    assert GAP not in [token for text in seen for token in encode(text)]


def test_work_is_bounded_in_every_call_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """More text than is read, all of it quoted: counted in characters."""
    for name, value in (("READ", 8192), ("STEP", 512), ("WINDOW", 64), ("AHEAD", 16)):
        monkeypatch.setattr(forms_module, name, value)
    lines = [f'value_{n} = "{n}"' for n in range(600)]
    pieces = ["\n".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]
    assert sum(map(len, pieces)) > 8192
    found, longest = forms_of(pieces, budget=2000), max(map(len, pieces))
    for line in reversed(lines):
        read, tokens = found.read, found.tokens
        index = found.text(escaped(f"\n{line}"), inside_json=True)
        assert found.read - read < 512 + longest
        assert found.tokens - tokens <= 2 * 64, "each character of a window is two at most"
    assert 8192 <= found.read < 8192 + SHORTEST
    assert found.tokens == 2000
    assert len(index) <= 2000 + 2000 // 16
    assert found.text("", inside_json=True) is index, "a call without text to look for is harmless"


def test_reading_many_short_pieces_is_bounded_too() -> None:
    asked = iter(range(10 * STEP))
    found = Forms(encode, ("" for _ in asked), BUDGET)
    found.text("anything", inside_json=True)
    assert next(asked, 10 * STEP) <= STEP // SHORTEST + 1


def test_of_many_places_that_match_the_newest_few_are_made() -> None:
    calls: list[str] = []
    pieces = [f"the same words\nin piece {n}" for n in range(2 * HITS)]
    found = forms_of(pieces, lambda text: calls.append(text) or encode(text))  # type: ignore[func-returns-value]
    for _ in pieces:
        found.text("the same words", inside_json=True)
    assert calls == [escaped(piece) for piece in pieces[: HITS - 1 : -1]]


def test_what_is_tokenised_is_not_tokenised_again() -> None:
    calls: list[str] = []
    found = forms_of([SOURCE], lambda text: calls.append(text) or encode(text))  # type: ignore[func-returns-value]
    for end in range(NEEDLE, len(SOURCE)):
        found.text(escaped(SOURCE)[:end], inside_json=True)
    assert calls == [escaped(SOURCE)]
    found.text(SOURCE[:NEEDLE], inside_json=False)
    assert len(calls) == 1, "as it stands in the prompt it is indexed already"


def test_nothing_is_made_of_blanks_nor_of_what_needs_no_other_dress() -> None:
    """Blanks stand everywhere and say nothing of what is quoted; what needs no escape is in the prompt as it is."""
    calls: list[str] = []
    found = forms_of(
        ["x = 1\n" + " " * 20 + "y = 2", "the price is ten and the name is x"],
        lambda text: calls.append(text) or encode(text),  # type: ignore[func-returns-value]
    )
    found.text("so:\n" + " " * 12, inside_json=True)
    found.text("the price is", inside_json=True)
    assert calls == []


def test_a_long_quotation_goes_on_behind_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms_module, "WINDOW", 64)
    monkeypatch.setattr(forms_module, "AHEAD", 16)
    text = "\n".join(f"line {n} of the file" for n in range(30))
    written = escaped(text)
    calls: list[str] = []
    found = forms_of([text], lambda part: calls.append(part) or encode(part))  # type: ignore[func-returns-value]
    right = 0
    for end in range(NEEDLE, len(written)):
        index = found.text(written[:end], inside_json=True)
        places = index.places_of(encode(written[max(0, end - 32) : end]))
        ahead = max(places, key=lambda place: place.length).continuation(16)
        right += "".join(map(chr, ahead[:1])) == written[end]
        # An escape that is half written stands for nothing yet.
        assert len(ahead) >= min(15, len(written) - end), "the next window was made too late"
    assert right > 0.9 * (len(written) - NEEDLE)
    assert found.tokens < 3.2 * len(written), "each window begins with a line, and ends AHEAD of the next"

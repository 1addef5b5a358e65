"""Emission forms: what they say, that copies from them are token-exact, and what they may cost."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.lookup import forms as forms_module
from whiflash_sglang.lookup.calibration import EVEN_ODDS, MatchCalibration
from whiflash_sglang.lookup.copier import FORM_MATCH, Copier
from whiflash_sglang.lookup.forms import (
    NEEDLE,
    WINDOW,
    Forms,
    dedented,
    escaped,
    forms,
    pieces_of,
    undiffed,
    unescaped,
    unnumbered,
)
from whiflash_sglang.lookup.index import GAP, SuffixIndex

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


def test_a_diff_without_its_prefixes() -> None:
    diff = "--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,2 @@\n def f():\n-    return 1\n+    return 2\n"
    assert undiffed(diff) == "--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,2 @@\ndef f():\n    return 1\n    return 2\n"
    assert undiffed("- a list\n- of two\n") is None


def test_without_the_common_indent() -> None:
    assert dedented("    a\n\n      b\n") == "a\n\n  b\n"
    assert dedented("a\n  b") is None


def test_no_form_is_what_the_prompt_says_or_comes_twice() -> None:
    assert forms("plain words", inside_json=True) == []
    assert forms("plain words", inside_json=False) == []
    assert forms(SOURCE, inside_json=True) == [escaped(SOURCE)]
    listing = "\n".join(f"{n}:{line}" for n, line in enumerate(SOURCE.splitlines(), 1))
    assert escaped(SOURCE.rstrip("\n")) in forms(listing, inside_json=True)
    told = json.dumps({"output": SOURCE})
    assert SOURCE in forms(told, inside_json=False)
    for inside_json in (False, True):
        for piece in (SOURCE, listing, told):
            found = forms(piece, inside_json=inside_json)
            assert len(found) == len(set(found))
            assert piece not in found


def test_pieces_are_what_stands_between_special_tokens() -> None:
    table = [bytes([i]) for i in range(256)] + [b"<|end|>"]
    prompt = [*b"first one", 256, *b"short", 256, *"zweites Stück".encode(), 300]
    assert pieces_of(prompt, table, frozenset({256})) == ["first one", "zweites Stück"]


def copied(pieces: Sequence[str], written: str, kind: str | None) -> str:
    """What a request that has written this copies next, from forms and from its own prompt."""
    found = Forms(encode, pieces)
    copier = Copier(MatchCalibration(EVEN_ODDS), forms=lambda: found.texts(written, kind))
    copier.extend(encode("\x00".join([*pieces, written])))
    return "".join(chr(copied.token) for copied in copier.look(40, worth=0.0).tokens)


@pytest.mark.parametrize("kind", ["tool_call", "json", "code", None])
def test_the_open_span_chooses_the_form(kind: str | None) -> None:
    ahead = copied([SOURCE], '{"text": "def total(rows):', kind)
    wanted = escaped(SOURCE) if kind in ("tool_call", "json") else SOURCE
    assert ahead == wanted.removeprefix("def total(rows):")[:40]


def test_a_listing_is_quoted_without_its_numbers() -> None:
    listing = "\n".join(f"{n:6}\t{line}" for n, line in enumerate(SOURCE.splitlines(), 1))
    assert copied([listing], "```\ndef total(rows):", "code").startswith('\n    """Sum of "rows"')
    assert copied([listing], '"def total(rows):', "json").startswith('\\n    \\"\\"\\"Sum of')


def test_the_newest_piece_is_found_first() -> None:
    older, newer = "price: 10\nname: \tx", "price: 10\nname: \ty"
    assert copied([older, newer], '"price: 10', "json") == "\\nname: \\ty"


@pytest.mark.parametrize(("extra", "form"), [(0, True), (-1, False)])
def test_a_form_is_copied_from_only_where_much_of_it_matches(extra: int, form: bool) -> None:
    """As long a match with the text's own words loses against it; a short one is not looked at."""
    shared = list(range(FORM_MATCH + extra))
    index = SuffixIndex([*shared, 70, 71, GAP], growing=False)
    copier = Copier(MatchCalibration(EVEN_ODDS), forms=lambda: (index,))
    copier.extend([*shared, 80, 81, 99, *shared])
    assert copier.look(2, worth=0.0).tokens[0].token == (70 if form else 80)
    assert [copied.token for copied in copier.look_beyond([80], 1.0, 1, worth=0.0).tokens] == [81]


CHARS = st.text(alphabet='ab\n"1: ', max_size=200)


@settings(deadline=None, max_examples=100)
@given(st.lists(CHARS, max_size=5), CHARS, st.sampled_from(["json", "code"]))
def test_only_forms_of_the_prompt_are_indexed(pieces: list[str], output: str, kind: str) -> None:
    """Every indexed text lies in a form, begins where no earlier window did, and is counted."""
    seen: list[str] = []
    found = Forms(lambda text: seen.append(text) or encode(text), pieces)  # type: ignore[func-returns-value]
    for end in range(len(output)):
        (index,) = found.texts(output[: end + 1], kind)
    known = [form for piece in pieces for form in forms(piece, inside_json=kind == "json")]
    assert all(any(text in form for form in known) for text in seen)
    assert sum(map(len, seen)) == found.tokenised
    if output:
        assert len(index) == sum(len(text) + 1 for text in seen)
        assert list(index.continuation(0, WINDOW)) == (encode(seen[0]) if seen else [])
    assert GAP not in [token for text in seen for token in encode(text)]


def test_work_is_bounded_in_every_call_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """More text than is read, all of it quoted: counted in characters."""
    for name, value in (("READ", 8192), ("STEP", 512), ("WINDOW", 64), ("AHEAD", 16), ("BUDGET", 2048)):
        monkeypatch.setattr(forms_module, name, value)
    lines = [f'value_{n} = "{n}"' for n in range(600)]
    pieces = ["\n".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]
    assert sum(map(len, pieces)) > 8192
    found, longest = Forms(encode, pieces), max(map(len, pieces))
    for line in reversed(lines):
        transformed, tokenised = found.transformed, found.tokenised
        (index,) = found.texts(escaped(f"\n{line}"), "json")
        assert found.transformed - transformed < 512 + longest
        assert found.tokenised - tokenised <= 64
    assert found.transformed == 8192
    assert 2048 - 64 < found.tokenised <= 2048
    assert len(index) <= 2048 + 2048 // 16
    assert found.texts("", "json") == (index,), "a call without text to look for is harmless"


def test_what_is_tokenised_is_not_tokenised_again() -> None:
    calls: list[str] = []
    found = Forms(lambda text: calls.append(text) or encode(text), [SOURCE])  # type: ignore[func-returns-value]
    for end in range(NEEDLE, len(SOURCE)):
        found.texts(escaped(SOURCE)[:end], "json")
    assert calls == [escaped(SOURCE)]
    found.texts(SOURCE[:NEEDLE], "code")
    assert len(calls) == 1, "as it stands in the prompt it is indexed already"


def test_a_long_quotation_goes_on_behind_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms_module, "WINDOW", 64)
    monkeypatch.setattr(forms_module, "AHEAD", 16)
    text = "\n".join(f"line {n} of the file" for n in range(30))
    written = escaped(text)
    calls: list[str] = []
    found = Forms(lambda part: calls.append(part) or encode(part), [text])  # type: ignore[func-returns-value]
    right = 0
    for end in range(NEEDLE, len(written)):
        (index,) = found.texts(written[:end], "json")
        places = index.places_of(encode(written[max(0, end - 32) : end]))
        ahead = max(places, key=lambda place: place.length).continuation(1)
        right += "".join(map(chr, ahead)) == written[end]
    assert right > 0.9 * (len(written) - NEEDLE)
    assert found.tokenised < 3 * len(written)

"""Calls in markup: what their form and their tools tell, and silence where something else is written."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from whiflash_sdk.hints import Span

from whiflash_sglang.spans.vocabulary import Vocabulary
from whiflash_sglang.structure.calls import Calls
from whiflash_sglang.structure.chances import Kind, LikelyText
from whiflash_sglang.structure.guesses import STEPS, Guesses
from whiflash_sglang.structure.sketch import sketch
from whiflash_sglang.structure.tools import MOST_FUNCTIONS, carried_tools, words_of_tools

SPANS = [Span(kind="tool_call", begin="<tool_call>", end="</tool_call>")]
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "note": {"type": "string"},
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "kelvin"]},
        "wet": {"type": "boolean"},
    },
    "required": ["city", "unit"],
}
FUNCTIONS: list[tuple[str | None, Any]] = [
    ("get_weather", WEATHER),
    ("get_weather_map", None),
    ("sing", {"type": "object", "properties": {}}),
]
QWEN, GLM = (carried_tools(FUNCTIONS, parser) or "" for parser in ("qwen3_coder", "glm47"))
MANY = carried_tools([(f"tool_{n}", {"properties": {"a": {}}}) for n in range(MOST_FUNCTIONS)], "qwen3_coder") or ""

CITY = "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome"
UNIT = f"{CITY}\n</parameter>\n<parameter=unit>\n"


def follow(written: str, tools: str = QWEN, prompt: str = "") -> str:
    """Text that is expected after `written`."""
    calls = Calls(tools, SPANS, prompt)
    calls.follow(written)
    return "".join(piece.text for piece in calls.pieces(1000, None))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("It is ", ""),
        ("<", "tool_call>\n<function=get_weather>\n<parameter=city>\n"),
        ("<tool_call>", "\n<function=get_weather>\n<parameter=city>\n"),
        ("<tool_call>\n<function=si", "ng>\n</function>\n</tool_call>"),
        ("<tool_call><function=get_weather_", "map>\n</function>\n</tool_call>"),
        ("<tool_call>\n<function=none>\n<par", ""),
        ("<tool_call>\n<function=get_weather>\n<parameter=n", "ote>\n"),
        (CITY, ""),
        (f"{CITY} <b", ""),
        (f"{CITY}\n", "</parameter>\n<parameter=unit>\ncelsius\n</parameter>\n</function>\n</tool_call>"),
        (f"{CITY}</p", "arameter>\n<parameter=unit>\ncelsius\n</parameter>\n</function>\n</tool_call>"),
        (f"{UNIT}k", "elvin\n</parameter>\n</function>\n</tool_call>"),
        (f"{UNIT}fahrenheit", ""),
        (f"{UNIT}kelvin\n</parameter>\n<", "/function>\n</tool_call>"),
        (f"{UNIT}kelvin\n</parameter>\n<p", "arameter=note>\n"),
        (f"{UNIT}kelvin\n</parameter>\n<parameter=wet>\nf", "alse\n</parameter>\n</function>\n</tool_call>"),
        (f"{UNIT}kelvin\n</parameter>\n</function>\n</", "tool_call>"),
        (
            "<tool_call><function=sing></function></tool_call> and <tool_call>",
            "<function=get_weather>\n<parameter=city>\n",
        ),
    ],
)
def test_what_the_tools_tell(written: str, expected: str) -> None:
    assert follow(written) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("<tool_call>", "get_weather<arg_key>city</arg_key><arg_value>"),
        ("<tool_call>get_weather", "<arg_key>city</arg_key><arg_value>"),
        ("<tool_call>get_weather_", "map</tool_call>"),
        ("<tool_call>get_weather\n<arg_", "key>city</arg_key><arg_value>"),
        ("<tool_call>get_weather<arg_key>city</arg_key>\n", "<arg_value>"),
    ],
)
def test_names_that_nothing_ends(written: str, expected: str) -> None:
    assert follow(written, GLM) == expected


def test_calls_are_laid_out_as_the_newest_of_the_prompt() -> None:
    call = "<tool_call> <function=get_weather><parameter=city>Oslo</parameter>\n\n</function></tool_call>"
    assert follow("<tool_call>", prompt=call) == " <function=get_weather><parameter=city>"
    found = follow(f"{CITY}</", prompt=call)
    assert found == "parameter>\n<parameter=unit>celsius</parameter>\n\n</function></tool_call>"
    other = "<tool_call>\n<function=example>\n<parameter=x>\n1"
    assert follow("<tool_call>", prompt=call + other) == " <function=get_weather><parameter=city>"


def test_the_tool_that_the_conversation_called_most() -> None:
    prompt = "<function=sing> <function=sing> <function=get_weather>"
    assert follow("<tool_call>\n<", prompt=prompt).startswith("function=sing>")


def test_a_wrong_guess_lowers_its_own_kind() -> None:
    calls = Calls(QWEN, SPANS)
    calls.follow("<tool_call>")
    pieces = [piece._replace(among=()) for piece in calls.pieces(1000, None)]
    assert [piece for piece in pieces if piece.kind is not Kind.FORCED] == [
        LikelyText("\n", Kind.USUAL),
        LikelyText("g", Kind.WORD),
        LikelyText(">", Kind.WORD),
        LikelyText("\n", Kind.USUAL),
        LikelyText("p", Kind.CHOICE),
        LikelyText("c", Kind.CHOICE),
        LikelyText("\n", Kind.USUAL),
    ]
    calls = Calls(QWEN, SPANS)
    calls.follow(f"{CITY}\n")
    assert calls.pieces(1000, None)[0].kind is Kind.ENDED


MARKUP = ("<function=", "sing", "get_weather", ">", "</function>", "<parameter=", "city", "</parameter>", CITY)
IN_JSON = (
    *("{", '"name"', ': "sing"', ', "arguments": {}', "}", "</", " ", '<tool_call>\n{"name"'),
    '<tool_call>{"name": "sing", "arguments": {}}',
)
FORMS = {"markup": (QWEN, MARKUP), "JSON": (carried_tools(FUNCTIONS, "hermes") or "", IN_JSON)}


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None)
@given(data=st.data(), seed=st.integers(0, 3))
def test_a_call_is_the_same_however_its_text_comes(form: str, data: st.DataObject, seed: int) -> None:
    """And looking behind drafts is following them, and leaves no trace."""
    tools, words = FORMS[form]
    words = (*words, "<tool", "_call>", "</tool_call>", "\n", "é")
    text, rng = "".join(data.draw(st.lists(st.sampled_from(words), max_size=16))), random.Random(seed)
    whole, parts = Calls(tools, SPANS), Calls(tools, SPANS)

    def expected_of(calls: Calls) -> object:
        return calls.pieces(1000, Guesses(words_of_tools(tools), lambda text: 0))

    whole.follow(text)
    expected = expected_of(whole)
    cuts = sorted(rng.randint(0, len(text)) for _ in range(6))
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        before = expected_of(parts)
        ahead = parts.copy()
        ahead.follow(text[begin:])
        assert expected_of(ahead) == expected
        assert ahead.place == whole.place
        assert expected_of(parts) == before
        parts.follow(text[begin:end])
    assert expected_of(parts) == expected


def test_work_is_bounded_for_any_tools_and_any_value(vocabulary: Vocabulary) -> None:
    calls = Calls(MANY, SPANS)
    calls.follow("<tool_call>\n<function=tool_3>\n<parameter=a>\n" + "x<" * 100_000)
    assert len(calls.pieces(10_000, None)) <= STEPS
    assert len(calls._call._pending) <= 256  # type: ignore[union-attr]
    assert len(calls._call._functions) == 128  # type: ignore[union-attr]
    assert 0 < len(sketch(vocabulary, [], 8, calls=calls)) <= 8


@pytest.mark.parametrize(
    "parameters",
    [
        3,
        [],
        {"properties": 3},
        {"properties": {"a": 3}, "required": 4},
        {"properties": {"a": {"enum": "b"}}, "required": [{}]},
    ],
)
def test_schemas_that_are_none_are_followed_as_far_as_they_tell(parameters: Any) -> None:
    assert follow("<tool_call>\n<func", carried_tools([("f", parameters)], "qwen3_coder") or "").startswith("tion=f>\n")

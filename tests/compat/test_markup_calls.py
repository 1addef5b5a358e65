"""Calls in markup that the structure arm expects are calls to SGLang's parsers of the same names."""

import json
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from whiflash_sdk.hints import Span
from whiflash_sdk.presets import MARKUP_ARGUMENTS, TOOL_CALL_PARSERS

from whiflash_sglang.structure.calls import Calls
from whiflash_sglang.structure.tools import PARSERS, carried_tools

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "note": {"type": "string"},
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "integer"},
    },
    "required": ["city", "unit", "days"],
}
FUNCTIONS = [("get_time", {"type": "object", "properties": {}}), ("get_weather", WEATHER)]
VALUES = {"city": "New York", "days": "3"}


def walked(parser: str, prompt: str) -> tuple[str, str]:
    """A call by a model that writes what is expected and, where nothing is, the next of `VALUES`; and what of it
    was expected.
    """
    (first, *_) = TOOL_CALL_PARSERS[parser]
    span = Span(kind=first.kind, begin=first.begin, end=first.end)
    calls = Calls(carried_tools(FUNCTIONS, parser) or "", [span], prompt)
    values = iter(VALUES.values())
    closing = PARSERS[parser].value.split("{value}")[1]
    written = expected = ""
    text = str(span.begin)
    while True:
        calls.follow(text)
        written += text
        if str(span.end) in written:
            return written, expected
        text = "".join(piece.text for piece in calls.pieces(400, None))
        expected += text
        if not text:
            # Its end is expected when it has begun.
            text = next(values) + closing[: 1 + len(closing) - len(closing.lstrip())]


@pytest.mark.parametrize("parser", PARSERS)
def test_a_call_as_it_is_expected_is_read_as_that_call(parser: str) -> None:
    named = PARSERS[parser].call.lstrip().replace("{name}", "get_weather").replace("{index}", "1")
    written, expected = walked(parser, f"before <x> {named} </x>")
    tools = [Tool(type="function", function={"name": name, "parameters": parameters}) for name, parameters in FUNCTIONS]
    _, (call, *more) = FunctionCallParser(tools, parser).parse_non_stream(written)
    assert not more
    found = json.loads(call.parameters)
    assert (call.name, list(found)) == ("get_weather", ["city", "unit", "days"])
    assert {key: str(value).strip() for key, value in found.items()} == {**VALUES, "unit": "celsius"}
    free = sum(map(len, VALUES.values()))
    assert len(expected) > len(written) - len(str(TOOL_CALL_PARSERS[parser][0].begin)) - free - 8


def test_no_parser_is_known_that_sglang_has_not() -> None:
    assert PARSERS.keys() <= FunctionCallParser.ToolCallParserEnum.keys()


def test_the_sdk_knows_who_writes_markup() -> None:
    assert set(PARSERS) == MARKUP_ARGUMENTS

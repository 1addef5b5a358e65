"""Every parser of SGLang has its spans, with the markers that its own class looks for."""

import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser
from whiflash_sdk import presets

TOOLS: dict[str, Any] = FunctionCallParser.ToolCallParserEnum
REASONING: dict[str, Any] = ReasoningParser.DetectorMap
OF_A_TEMPLATE = {"response_template"}
"""Markers are those of the served model's template."""

WRITTEN_OUT = {
    ("gpt-oss", "to=functions."),
    ("llama3", '{"name":'),
    *(("pythonic", marker) for marker in ("<|python_start|>", "<|python_end|>")),
}
"""Markers of texts in which the class finds its own: `tests/spans/test_infer.py` walks through the first two; Llama 4
writes the others around its calls."""


@pytest.mark.newest
def test_no_parser_is_left_out() -> None:
    assert presets.TOOL_CALL_PARSERS.keys() == TOOLS.keys() - OF_A_TEMPLATE
    assert presets.REASONING_PARSERS.keys() == REASONING.keys() - OF_A_TEMPLATE


def texts(value: Any) -> Iterator[str]:
    """Strings in a value, as they are matched: expressions without their escapes."""
    if isinstance(value, str):
        yield value
        yield value.replace("\\", "")
    elif isinstance(value, re.Pattern):
        yield from texts(value.pattern)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts(key)
            yield from texts(inner)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from texts(inner)


def held(detector: Any) -> set[str]:
    """Texts that a detector compares with: its own strings, its classes', and constants of their modules."""
    found = set(texts(vars(detector)))
    for cls in type(detector).__mro__:
        if cls.__module__.startswith("sglang.") and not cls.__name__.startswith("Base"):
            found.update(texts(dict(vars(cls))))
            module = vars(sys.modules[cls.__module__])
            found.update(texts({k: v for k, v in module.items() if k.strip("_").isupper()}))
    return found


@pytest.mark.newest
@pytest.mark.parametrize("name", presets.TOOL_CALL_PARSERS)
def test_calls_are_marked_as_the_parser_marks_them(name: str) -> None:
    detector = TOOLS[name]()
    known = held(detector)
    for span in presets.TOOL_CALL_PARSERS[name]:
        for marker in filter(None, (span.begin, span.end)):
            assert (name, marker) in WRITTEN_OUT or any(marker in text for text in known), marker
    # A parser with one mark of a call has it here.
    (first, *_), begin = presets.TOOL_CALL_PARSERS[name], getattr(detector, "bot_token", "")
    assert not begin or first.begin in begin or (name, first.begin) in WRITTEN_OUT


@pytest.mark.newest
@pytest.mark.parametrize("name", presets.REASONING_PARSERS)
def test_reasoning_is_marked_as_the_parser_marks_it(name: str) -> None:
    detector = ReasoningParser(name).detector
    (span,) = presets.REASONING_PARSERS[name]
    begin = getattr(detector, "think_start_token", None)
    if begin is None:
        known = held(detector)
        assert all(any(marker in text for text in known) for marker in (span.begin, span.end))
    else:
        assert (span.begin in begin, span.end in detector.think_end_token) == (True, True)
    # Harmony's first marker is written by the model, though its parser takes all for reasoning from the start.
    opens = name != "gpt-oss" and bool(getattr(detector, "_in_reasoning", False))
    assert opens == (name in presets.OPENS_REASONING)


def test_a_wrong_marker_is_seen() -> None:
    assert not any("<tool_cal1>" in text for text in held(TOOLS["qwen3_coder"]()))
    assert any("<tool_call>" in text for text in held(TOOLS["qwen3_coder"]()))

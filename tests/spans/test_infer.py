"""Inference, and that the SDK and the server mean the same by the same bytes."""

from itertools import groupby
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from whiflash_sdk import Hints, Span
from whiflash_sdk import hints as sdk_hints
from whiflash_sdk.hints import Arm, Kind
from whiflash_sdk.presets import likely_spans

from whiflash_sglang.spans.hints import parse_hints
from whiflash_sglang.spans.tracker import SpanTracker


def walk(spans: tuple[Span, ...], text: str) -> list[str | None]:
    """Kinds in order of their change, one byte a token."""
    pieces = [bytes((byte,)) for byte in text.encode()]
    tracker = SpanTracker(spans, pieces)
    kinds = [tracker.span.kind if tracker.span else None]
    for index in range(len(pieces)):
        tracker.push([index])
        kinds.append(tracker.span.kind if tracker.span else None)
    return [kind for kind, _ in groupby(kinds)]


def inferred(
    tool_parser: str | None, reasoning_parser: str | None, form: str | None = None, *, forced: bool = False
) -> tuple[Span, ...]:
    return likely_spans(
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        has_tools=form is None,
        response_format=form,
        forced=forced,
        reasoning_open=True if form else None,
    )


@pytest.mark.parametrize(
    ("tool_parser", "reasoning_parser", "text", "expected"),
    [
        ("qwen25", "qwen3", "<think>a</think>b<tool_call>\n{}\n</tool_call>",
         [None, "reasoning", None, "tool_call", None]),
        ("llama3", None, 'x<|python_tag|>{"name": "f"}', [None, "tool_call"]),
        ("llama3", None, '{"name": "f"}', [None, "tool_call"]),
        ("mistral", None, 'x[TOOL_CALLS] [{"name": "f"}]', [None, "tool_call"]),
        ("gpt-oss", "gpt-oss", "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary "
         "to=functions.f<|constrain|>json<|message|>{}<|call|>", [None, "reasoning", None, "tool_call", None]),
        (None, None, "see:\n```json\n{}\n```\nand\n```py\nx\n```", [None, "code", "json", None, "code", None]),
    ],
)  # fmt: skip
def test_parsers_mark_their_formats(
    tool_parser: str | None, reasoning_parser: str | None, text: str, expected: list[str | None]
) -> None:
    assert walk(inferred(tool_parser, reasoning_parser), text) == expected


MARKER = st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64)
SPAN = st.builds(
    lambda **fields: fields,
    kind=st.sampled_from(get_args(Kind)),
    begin=MARKER,
    end=MARKER,
    open=st.booleans(),
    prefer=st.none() | st.sampled_from(get_args(Arm)),
    pin=st.booleans(),
    bias=st.dictionaries(st.sampled_from(get_args(Arm)), st.floats(-16, 16)),
)


LEVELS: list[bool | sdk_hints.TraceLevel] = [False, True, "summary", "full"]


OTHERS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("off", "infer", "learn"), st.booleans()),
        "trace": st.sampled_from(LEVELS),
        "lookup": st.sampled_from(get_args(sdk_hints.LookupScope)),
    },
)


@given(st.lists(SPAN, max_size=18), OTHERS)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_the_server_reads_what_the_sdk_writes(spans: list[dict[str, object]], others: dict[str, Any]) -> None:
    try:
        sent = Hints(spans=tuple(Span(**span) for span in spans), **others)  # type: ignore[arg-type]
        params = sent.custom_params()
    except (ValidationError, sdk_hints.HintError):
        return
    trace = "summary" if sent.trace is True else sent.trace or None
    assert dict(parse_hints(params)) == dict(sent) | {"trace": trace, "tools": "", "inferred": False}

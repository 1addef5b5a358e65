"""Spans of a request that carries no hints, from what it asks for and how the server parses output."""

from functools import lru_cache

from whiflash_sdk.presets import likely_spans

from whiflash_sglang.spans.hints import RequestHints, SpanHint


@lru_cache(maxsize=256)
def infer_spans(
    tool_parser: str | None,
    reasoning_parser: str | None,
    has_tools: bool,
    response_format: str | None,
    forced: bool,
    reasoning_open: bool | None = None,
) -> RequestHints:
    """Default hints; parser names that are not known add no spans of their own.

    tool_parser, reasoning_parser: `--tool-call-parser` and `--reasoning-parser` of the server.
    has_tools: the request offers tools and its `tool_choice` is not `none`.
    response_format: the request's `response_format.type`, or None.
    forced: `tool_choice` is `required` or names a function, so the grammar starts inside the call.
    reasoning_open: the rendered prompt ends inside the reasoning; None takes the parser's habit.
    """
    spans = likely_spans(
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        has_tools=has_tools,
        response_format=response_format,
        forced=forced,
        reasoning_open=reasoning_open,
    )
    return RequestHints(spans=tuple(SpanHint(s.kind, s.begin, s.end, s.open) for s in spans))

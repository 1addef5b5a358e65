"""Derives spans from a request's own tools, tool choice and response format, without hints of the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whiflash_sdk.hints import MAX_SPANS, Span
from whiflash_sdk.presets import REASONING_PARSERS, TOOL_CALL_PARSERS, likely_spans


def derive_spans(body: Mapping[str, Any], tool_parser: str | None, reasoning_parser: str | None) -> tuple[Span, ...]:
    """Derive the spans to send with that of a block such as `spans.code()`; none if a parser is unknown here.

    Outside such a block the server infers the spans, and it knows the markers of its own parsers.

    body: the request as sent, without `extra_body`.
    tool_parser, reasoning_parser: names of the server's parsers, from its capabilities.
    """
    if tool_parser not in (None, *TOOL_CALL_PARSERS) or reasoning_parser not in (None, *REASONING_PARSERS):
        return ()
    choice = body.get("tool_choice")
    has_tools = bool(body.get("tools")) and choice != "none"
    response_format = body.get("response_format")
    return likely_spans(
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        has_tools=has_tools,
        response_format=response_format.get("type") if isinstance(response_format, Mapping) else None,
        forced=has_tools and (choice == "required" or isinstance(choice, Mapping)),
    )


def open_first(spans: tuple[Span, ...], opened: Span) -> tuple[Span, ...]:
    """Put `opened` first. A span of the same kind keeps its markers and takes over its open, prefer, pin and bias."""
    for index, span in enumerate(spans):
        if span.kind == opened.kind:
            wishes = opened.model_dump(include={"open", "prefer", "pin", "bias"})
            return (span.model_copy(update=wishes), *spans[:index], *spans[index + 1 :])
    return (opened, *spans)[:MAX_SPANS]

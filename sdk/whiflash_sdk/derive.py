"""Hints nobody had to write: read from the request's own tools, response format and messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whiflash_sdk.hints import MAX_SPANS, Hints, Span
from whiflash_sdk.presets import REASONING_PARSERS, TOOL_CALL_PARSERS, likely_spans


def derive_spans(
    body: Mapping[str, Any], tool_parser: str | None, reasoning_parser: str | None
) -> tuple[Span, ...]:
    """The spans that a chat or text completion request is likely to write; none for a parser that is not known here.

    The server may know that parser's markers, and infers spans only for a request that brings none.

    body: the request as sent, without `extra_body`.
    tool_parser, reasoning_parser: names of the server's parsers, from its capabilities.
    """
    if not (_knows(TOOL_CALL_PARSERS, tool_parser) and _knows(REASONING_PARSERS, reasoning_parser)):
        return ()
    choice = body.get("tool_choice")
    has_tools = bool(body.get("tools")) and choice != "none"
    response_format = body.get("response_format")
    spans = likely_spans(
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        has_tools=has_tools,
        response_format=response_format.get("type") if isinstance(response_format, Mapping) else None,
        forced=has_tools and _is_forced(choice),
    )
    prefill = _prefill(body)
    return tuple(_after(span, prefill) for span in spans) if prefill else spans


def _knows(presets: Mapping[str, object], parser: str | None) -> bool:
    return parser is None or parser in presets


def _is_forced(choice: object) -> bool:
    """Whether the answer has to be a tool call: a named tool, or `required`, alone or among allowed tools."""
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        choice = (allowed if isinstance(allowed, Mapping) else choice).get("mode")
    return choice == "required" or isinstance(choice, Mapping)


def open_first(spans: tuple[Span, ...], opened: Span | None) -> tuple[Span, ...]:
    """`spans` with the one of `opened`'s kind open from the start, carrying its wishes; else it leads."""
    if opened is None:
        return spans
    for index, span in enumerate(spans):
        if span.kind == opened.kind:
            wishes = opened.model_dump(include={"open", "prefer", "pin", "bias"})
            return (span.model_copy(update=wishes), *spans[:index], *spans[index + 1 :])
    return (opened, *spans)[:MAX_SPANS]


def complete(hints: Hints, derived: tuple[Span, ...], opened: Span | None) -> Hints:
    """The hints to send: the derived spans where none were given, then the block's open span."""
    spans = tuple(hints.spans) or (derived if hints.infer else ())
    return hints.model_copy(update={"spans": open_first(spans, opened)})


def _prefill(body: Mapping[str, Any]) -> str:
    """Text the model is asked to continue: a last assistant message without tool calls."""
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant" or last.get("tool_calls"):
        return ""
    content = last.get("content")
    return content if isinstance(content, str) else ""


def _after(span: Span, text: str) -> Span:
    """The span as `text` leaves it: the output goes on where the text stops."""
    is_open, at = span.open, 0
    while marker := span.end if is_open else span.begin:
        found = text.find(marker, at)
        if found < 0:
            break
        at, is_open = found + len(marker), not is_open
    return span.model_copy(update={"open": is_open}) if is_open or span.begin else span

"""Hints for a block of code: `with spans.tool_call(): client.chat.completions.create(...)`.

A block says what the model is about to write. It holds for the calls made inside it, in this thread
or task, and blocks nest: the innermost that says something wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from whiflash_sdk.blocks import BlockValue
from whiflash_sdk.hints import Arm, Hints, Kind, Span

__all__ = ["code", "hinted", "json", "prose", "reasoning", "tool_call"]

_BLOCK: BlockValue[Hints] = BlockValue("whiflash_block", Hints())
_OPENED: BlockValue[Span | None] = BlockValue("whiflash_opened", None)


def block_hints() -> Hints:
    """The hints of the enclosing `hinted` blocks; empty outside."""
    return _BLOCK.get()


def opened_span() -> Span | None:
    """The span that the innermost enclosing block says the output starts in."""
    return _OPENED.get()


@contextmanager
def hinted(hints: Hints) -> Iterator[Hints]:
    """Calls inside the block carry these hints, over those of outer blocks and of the client."""
    with _BLOCK.holding(hints.over(block_hints())) as merged:
        yield merged


@contextmanager
def _opened(kind: Kind, prefer: Arm | None, pin: bool, bias: Mapping[Arm, float] | None) -> Iterator[Span]:
    span = Span(kind=kind, open=True, prefer=prefer, pin=pin, bias=dict(bias or {}))
    with _OPENED.holding(span):
        yield span


def tool_call(
    *, prefer: Arm | None = None, pin: bool = False, bias: Mapping[Arm, float] | None = None
) -> AbstractContextManager[Span]:
    """The output starts as a tool call."""
    return _opened("tool_call", prefer, pin, bias)


def json(
    *, prefer: Arm | None = None, pin: bool = False, bias: Mapping[Arm, float] | None = None
) -> AbstractContextManager[Span]:
    """The output starts as JSON."""
    return _opened("json", prefer, pin, bias)


def code(
    *, prefer: Arm | None = None, pin: bool = False, bias: Mapping[Arm, float] | None = None
) -> AbstractContextManager[Span]:
    """The output starts as code."""
    return _opened("code", prefer, pin, bias)


def reasoning(
    *, prefer: Arm | None = None, pin: bool = False, bias: Mapping[Arm, float] | None = None
) -> AbstractContextManager[Span]:
    """The output starts as reasoning."""
    return _opened("reasoning", prefer, pin, bias)


def prose(
    *, prefer: Arm | None = None, pin: bool = False, bias: Mapping[Arm, float] | None = None
) -> AbstractContextManager[Span]:
    """The output starts as prose."""
    return _opened("prose", prefer, pin, bias)

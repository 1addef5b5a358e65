"""Hints for a block of code: `with spans.tool_call(): client.chat.completions.create(...)`.

A block says what the model is about to write. It holds for the calls made inside it, in this thread
or task, and blocks nest: the innermost that says something wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from whiflash_sdk.blocks import BlockValue
from whiflash_sdk.hints import Arm, Hints, Kind, Span
from whiflash_sdk.session import naming_sessions

__all__ = ["code", "hinted", "json", "prose", "reasoning", "tool_call"]

_BLOCK: BlockValue[tuple[Hints, int]] = BlockValue("whiflash_block", (Hints(), 0))
"""Hints of the `hinted` blocks, and in how many sessions with an agent the innermost of them is."""
_OPENED: BlockValue[Span | None] = BlockValue("whiflash_opened", None)


def block_hints() -> Hints:
    """The hints of the enclosing `hinted` blocks and sessions, the innermost first; empty outside."""
    (held, depth), named = _BLOCK.get(), naming_sessions()
    return held if len(named) <= depth else named[0].hints().over(held)


def opened_span() -> Span | None:
    """The span that the innermost enclosing block says the output starts in."""
    return _OPENED.get()


@contextmanager
def hinted(hints: Hints) -> Iterator[Hints]:
    """Calls inside the block carry these hints, over those of outer blocks and of the client."""
    merged = hints.over(block_hints())
    with _BLOCK.holding((merged, len(naming_sessions()))):
        yield merged


class Opening(Protocol):
    """`with spans.code(): …`. Keywords: as of `Span`."""

    def __call__(
        self, *, prefer: Arm | None = None, pin: bool = False, bias: Mapping[Arm, float] | None = None
    ) -> AbstractContextManager[Span]: ...


def _opening(kind: Kind) -> Opening:
    @contextmanager
    def opened(
        *, prefer: Arm | None = None, pin: bool = False, bias: Mapping[Arm, float] | None = None
    ) -> Iterator[Span]:
        span = Span(kind=kind, open=True, prefer=prefer, pin=pin, bias=dict(bias or {}))
        with _OPENED.holding(span):
            yield span

    return opened


tool_call = _opening("tool_call")
"""The output starts as a tool call."""
json = _opening("json")
"""The output starts as JSON."""
code = _opening("code")
"""The output starts as code."""
reasoning = _opening("reasoning")
"""The output starts as reasoning."""
prose = _opening("prose")
"""The output starts as prose."""

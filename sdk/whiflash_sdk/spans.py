"""Hints for a block of code: `with spans.tool_call(): client.chat.completions.create(...)`.

A block says which kind of text the answer starts with. It holds for the calls made inside it, in this thread
or task. Blocks nest, and the innermost one wins.
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
"""Merged hints of the `hinted` blocks, and the number of sessions with a name around the innermost of them."""
_OPENED: BlockValue[Span | None] = BlockValue("whiflash_opened", None)


def block_hints() -> Hints:
    """Merge the hints of the enclosing `hinted` blocks and sessions, the innermost first; empty outside."""
    (held, depth), named = _BLOCK.get(), naming_sessions()
    for one in reversed(named[: len(named) - depth]):
        held = one.hints().over(held)
    return held


def opened_span() -> Span | None:
    """Return the span in which the output starts by the innermost block, such as `code`; None outside."""
    return _OPENED.get()


@contextmanager
def hinted(hints: Hints) -> Iterator[Hints]:
    """Add these hints to the calls inside the block; they win over those of outer blocks and of the client."""
    merged = hints.over(block_hints())
    with _BLOCK.holding((merged, len(naming_sessions()))):
        yield merged


class Opening(Protocol):
    """Type of the blocks `tool_call`, `json`, `code`, ...: `with spans.code(): …`. The keywords are those of `Span`."""

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

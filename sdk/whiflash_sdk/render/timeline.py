"""The timeline of a response: output tokens along x, a lane for every drafter, spans as bands behind the lanes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from whiflash_sdk.trace import Stretch

FITTING: Final = 200
"""Tokens that are distinguishable in a timeline as wide as the page."""
DEEPEST_ZOOM: Final = 64
_TICKS: Final = 8


class Column(NamedTuple):
    """Tokens of one stretch, or those between two that no round wrote.

    place: among the columns, from 1. number: of the stretch, from 1.
    """

    place: int
    begin: int
    tokens: int
    stretch: Stretch | None = None
    before: Stretch | None = None
    number: int = 0

    @property
    def span(self) -> str | None:
        """Of the stretch."""
        return self.stretch.span if self.stretch else None


def columns_of(stretches: Sequence[Stretch]) -> list[Column]:
    """The columns of a timeline, from left to right."""
    found: list[Column] = []
    end, before = 0, None
    for number, stretch in enumerate(stretches, 1):
        if stretch.start > end:
            found.append(Column(len(found) + 1, end, stretch.start - end))
        tokens = max(stretch.tokens, 0)
        found.append(Column(len(found) + 1, stretch.start, tokens, stretch, before, number))
        end, before = max(end, stretch.end), stretch
    return found


def zooms(tokens: int) -> list[int]:
    """How many times as wide as the page a timeline of so many tokens may be drawn."""
    levels = [1]
    while levels[-1] < DEEPEST_ZOOM and tokens > FITTING * levels[-1]:
        levels.append(levels[-1] * 2)
    return levels


def ticks(tokens: int) -> list[tuple[int, float]]:
    """Numbers below the lanes, each with the zoom from which it is shown."""
    step = next(step for step in _steps() if tokens <= step * _TICKS)
    # A narrow page has room for half of them.
    found: dict[int, float] = dict.fromkeys(range(0, tokens + 1, 2 * step), 0.5)
    for level in zooms(tokens):
        if step % level == 0:
            for place in range(0, tokens + 1, step // level):
                found.setdefault(place, level)
    return sorted(found.items())


def _steps() -> Iterator[int]:
    """Tokens between two numbers of the axis: round ones, whose halves are round too."""
    size = 1
    while True:
        yield from (size, 2 * size, 5 * size)
        size *= 10

"""Prices of work in seconds, measured at a server's start, and looked up by `costs.Costs`.

A graph costs its captured size: 17 rows in a graph of 20 cost as much as 20. So with graphs a price is that of the
smallest measured size that holds the work; without them it is on the line between two measured sizes. A verification
also reads the context of all its requests, and long contexts are split over the chip. It is measured at two total
context lengths, and a line through these gives other lengths.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Annotated

from pydantic import Field

SHORTEST = 1e-6
"""Smallest price in seconds, because a clock may not have moved between two readings."""

LONGEST = 60.0
"""Upper bound in seconds of a price in a file: no pass takes as long."""


@dataclass(frozen=True)
class Sizes:
    """Prices in seconds by size. Above the last size the price grows in proportion to the size.

    sizes: ascending. steps: whether work between two sizes costs as much as the larger one, since it is padded to it.
    """

    sizes: tuple[Annotated[int, Field(gt=0, strict=True)], ...]
    seconds: tuple[Annotated[float, Field(gt=0, lt=LONGEST, strict=True)], ...]
    steps: bool = True

    def __post_init__(self) -> None:
        ascending = self.sizes == tuple(sorted(set(self.sizes)))
        if not self.sizes or len(self.sizes) != len(self.seconds) or not ascending:
            raise ValueError(f"sizes must ascend and have a price each, got {self.sizes} and {self.seconds}")

    @classmethod
    def measured(cls, sizes: Iterable[int], price: Callable[[int], float], *, steps: bool = True) -> "Sizes":
        """Measure `price(size)` for each size. A size costs at least as much as any smaller one, since more work is
        never faster.
        """
        ordered = tuple(sorted(set(sizes)))
        return cls(ordered, tuple(accumulate((max(price(size), SHORTEST) for size in ordered), max)), steps)

    def at(self, size: float) -> float:
        """Return the price of this size."""
        if size > self.sizes[-1]:
            return self.seconds[-1] * size / self.sizes[-1]
        place = bisect_left(self.sizes, size)
        if self.steps or not place:
            return self.seconds[place]
        below, above = self.sizes[place - 1 : place + 1]
        share = (size - below) / (above - below)
        return self.seconds[place - 1] + share * (self.seconds[place] - self.seconds[place - 1])

    def slope(self, size: float) -> float:
        """Return the seconds of one more row or request at this size: the slope of the lower convex hull of all prices.

        The step to the next size may be free or expensive by chance, and edges without a rise are skipped.
        """
        place = bisect_left(self._rising, (size,))
        return self._rising[place][1] if place < len(self._rising) else self.seconds[-1] / self.sizes[-1]

    @cached_property
    def _rising(self) -> list[tuple[float, ...]]:
        """Return the rising edges of the prices' lower convex hull: the size at each one's end, and its slope."""
        sizes, seconds, place, edges = self.sizes, self.seconds, 0, list[tuple[float, ...]]()
        while place < len(sizes) - 1:
            later = range(place + 1, len(sizes))
            slope, place = min(((seconds[i] - seconds[place]) / (sizes[i] - sizes[place]), i) for i in later)
            if slope > 0.0:
                edges.append((sizes[place], slope))
        return edges


@dataclass(frozen=True, slots=True)
class Verifications:
    """Prices of verifications in seconds by rows, at two total context lengths (`short` < `long` tokens)."""

    short: int
    long: int
    at_short: Sizes
    at_long: Sizes

    def __post_init__(self) -> None:
        if not 0 <= self.short < self.long:
            raise ValueError(f"two contexts must differ, got {self.short} and {self.long}")

    @classmethod
    def measured(
        cls, short: int, long: int, sizes: Collection[int], price: Callable[[int, int], float], *, steps: bool = True
    ) -> "Verifications":
        """Measure the seconds `price(rows, context)` of all `sizes` (rows) at both contexts. steps: as in `Sizes`."""
        near = Sizes.measured(sizes, lambda rows: price(rows, short), steps=steps)
        far = Sizes.measured(sizes, lambda rows: price(rows, long), steps=steps)
        return cls(short, long, near, far)

    def at(self, rows: float, context: float) -> float:
        """Return the seconds of a verification for requests with `context` tokens in all, at least `short`."""
        return self._between(self.at_short.at(rows), self.at_long.at(rows), context)

    def slope(self, rows: float, context: float) -> float:
        """Return the seconds of one more row."""
        return self._between(self.at_short.slope(rows), self.at_long.slope(rows), context)

    def _between(self, near: float, far: float, context: float) -> float:
        share = max(context - self.short, 0.0) / (self.long - self.short)
        return near + share * max(far - near, 0.0)


@dataclass(frozen=True, slots=True)
class CostTables:
    """Prices in seconds of a round's work, measured at the start.

    verifications: timed with as many requests as the largest batch. drafts: arm → passes, by number of requests.
    shorter: arm → number of drafts → passes limited to it. catch_up: arm → catch-ups, by number of tokens. wider:
    number of rows → verifications in which each request has more, with a larger tile of attention. plain: rounds
    without drafts, if they have graphs of their own.
    """

    verifications: Verifications
    drafts: dict[str, Sizes]
    catch_up: dict[str, Sizes]
    shorter: dict[str, dict[int, Sizes]] = field(default_factory=dict)
    wider: dict[int, Verifications] = field(default_factory=dict)
    plain: Verifications | None = None

    @property
    def steps(self) -> bool:
        """Whether a verification is padded to a measured size, that of its graph."""
        return self.verifications.at_short.steps

    def verify(self, rows: float, requests: int, context: float) -> float:
        """Return the seconds of a verification of `rows` rows, for requests with `context` tokens in all."""
        if self.plain is not None and rows <= requests:
            return self.plain.at(rows, context)
        return self._by_width(Verifications.at, rows, requests, context)

    def row(self, rows: float, requests: int, context: float) -> float:
        """Return the seconds of one more row, in the tile of attention that these rows take."""
        return self._by_width(Verifications.slope, rows, requests, context)

    def _by_width(
        self, price: Callable[[Verifications, float, float], float], rows: float, requests: int, context: float
    ) -> float:
        """Return `price` of the table for a request's mean rows; just above a table's bound it blends two tables."""
        seconds = price(self.verifications, rows, context)
        for above, prices in self.wider.items():
            if (each := rows / max(requests, 1)) > above:
                seconds += min(each - above, 1.0) * (price(prices, rows, context) - seconds)
        return seconds

    def draft(self, arm: str, requests: int, length: int = 0) -> float:
        """Return the seconds of a pass, limited to `length` drafts if such passes were captured; 0 without a model."""
        if not requests or arm not in self.drafts:
            return 0.0
        return self.shorter.get(arm, {}).get(length, self.drafts[arm]).at(requests)

    def catch(self, arm: str, tokens: float) -> float:
        """Return the seconds in which `arm` ingests `tokens` tokens; 0 for an arm without KV."""
        return self.catch_up[arm].at(tokens) if tokens and arm in self.catch_up else 0.0

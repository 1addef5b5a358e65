"""`Costs` on a GPU: prices are looked up in tables that were measured at the start, times one factor learned since.

A GPU works asynchronously: the host's clock only shows how long launching took, so no price is fitted to it.

A graph costs its captured size: 17 rows in a graph of 20 cost as much as 20. So a price is that of the smallest
measured size that holds the work, without interpolation. A verification also reads the context of all its requests, and
long contexts are split over the chip. It is measured at two total context lengths, and a line through these gives other
lengths.

Rounds show what the tables cannot know (lower clocks, other processes, the host's share): one factor for all prices,
the seconds of rounds over their price. It moves slowly, and at once if most of the last rounds agree that it is wrong
(:mod:`whiflash_sglang.prices.fits`), like the fitted prices of :mod:`.costs`. Whole rounds are timed by device events.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Annotated

from pydantic import Field

from whiflash_sglang.drafts.rates import Mean
from whiflash_sglang.prices.costs import FULL_LENGTH, PROBE_ROUNDS, RATE_ROUNDS, Costs, Worth
from whiflash_sglang.prices.fits import MEMORY, Correction
from whiflash_sglang.prices.round_clock import RoundTime

WAITED = 0.05
"""A gap longer than this share of a round's seconds means that the device waited for the host. Launches leave small
gaps, too."""

FORGOTTEN = 0.998
"""Decay of the host's seconds per round in rounds in which the device did not wait: they may have become shorter."""

LONGEST = 60.0
"""Upper bound in seconds of a price in a file: no pass takes as long."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Prices in seconds by size. sizes: ascending. Above the last size the price grows in proportion to the size."""

    sizes: tuple[Annotated[int, Field(gt=0, strict=True)], ...]
    seconds: tuple[Annotated[float, Field(gt=0, lt=LONGEST, strict=True)], ...]

    def __post_init__(self) -> None:
        ascending = self.sizes == tuple(sorted(set(self.sizes)))
        if not self.sizes or len(self.sizes) != len(self.seconds) or not ascending:
            raise ValueError(f"sizes must ascend and have a price each, got {self.sizes} and {self.seconds}")

    @classmethod
    def measured(cls, sizes: Iterable[int], price: Callable[[int], float]) -> "Sizes":
        """Measure `price(size)` for each size. A size costs at least as much as any smaller one, since more work is
        never faster.
        """
        ordered = tuple(sorted(set(sizes)))
        return cls(ordered, tuple(accumulate(map(price, ordered), max)))

    def at(self, size: float) -> float:
        if size > self.sizes[-1]:
            return self.seconds[-1] * size / self.sizes[-1]
        return self.seconds[bisect_left(self.sizes, size)]

    def slope(self, size: float) -> float:
        """Return the seconds of one more row or request at this size: the slope of the lower convex hull of all prices.

        The step to the next size may be free or expensive by chance, and edges without a rise are skipped.
        """
        edges = _rising(self)
        place = bisect_left(edges, (size,))
        return edges[place][1] if place < len(edges) else self.seconds[-1] / self.sizes[-1]


@lru_cache
def _rising(prices: Sizes) -> list[tuple[float, ...]]:
    """Return the rising edges of the prices' lower convex hull: the size at each one's end, and its slope."""
    sizes, seconds, place, edges = prices.sizes, prices.seconds, 0, list[tuple[float, ...]]()
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
        cls, short: int, long: int, sizes: Collection[int], price: Callable[[int, int], float]
    ) -> "Verifications":
        """Measure `price(rows, context)` for each of `sizes` at both contexts."""
        near = Sizes.measured(sizes, lambda rows: price(rows, short))
        far = Sizes.measured(sizes, lambda rows: price(rows, long))
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


LEFT_OUT = 2.0
"""Least assumed worth of a draft that finds no room in a smaller graph, as a multiple of a row's price."""


@dataclass(frozen=True, slots=True)
class CostTables:
    """Prices in seconds of all captured work, measured at the start.

    verifications: with rows spread over as many requests as a batch has. drafts: by arm, passes by number of requests.
    catch_up: by arm, by number of rows. shorter: by arm and number of drafts, limited passes. wider: by rows of a
    request, verifications with more rows for each, for which attention takes a larger tile. plain: rounds without
    drafts, which have graphs of their own.
    """

    verifications: Verifications
    drafts: dict[str, Sizes]
    catch_up: dict[str, Sizes]
    shorter: dict[str, dict[int, Sizes]] = field(default_factory=dict)
    wider: dict[int, Verifications] = field(default_factory=dict)
    plain: Verifications | None = None

    def verify(self, rows: float, requests: int, context: float) -> float:
        """Return the seconds of a verification of so many rows, for requests with `context` tokens in all."""
        if self.plain is not None and rows <= requests:
            return self.plain.at(rows, context)
        return self._by_width(rows, requests, lambda prices: prices.at(rows, context))

    def row(self, rows: float, requests: int, context: float) -> float:
        """Return the seconds of one more row, in the tile of attention that these rows take."""
        return self._by_width(rows, requests, lambda prices: prices.slope(rows, context))

    def _by_width(self, rows: float, requests: int, price: Callable[[Verifications], float]) -> float:
        """Return `price` of the table for a request's mean rows; just above a table's bound it blends two tables."""
        seconds, each = price(self.verifications), rows / max(requests, 1)
        for above, prices in self.wider.items():
            if each > above:
                seconds += min(each - above, 1.0) * (price(prices) - seconds)
        return seconds

    def draft(self, arm: str, requests: int, length: int = 0) -> float:
        """Return the seconds of a pass, limited to `length` drafts if such passes were captured; 0 without a model."""
        if not requests or arm not in self.drafts:
            return 0.0
        return self.shorter.get(arm, {}).get(length, self.drafts[arm]).at(requests)

    def catch(self, arm: str, tokens: float) -> float:
        """Return the seconds in which `arm` ingests so many tokens; 0 for an arm without KV."""
        return self.catch_up[arm].at(tokens) if tokens and arm in self.catch_up else 0.0


class LookedUpCosts(Costs):
    """Costs on a GPU: looks prices up in `tables`, which must be set before anything is priced.

    A round pads its verification to the drafts that it has room for, so that number of rows is looked up.
    """

    tables: CostTables
    priced_by = "rounds"
    """All rounds count: plain rounds of every size were timed at the start, and any round corrects all prices."""

    def __init__(self, width: Callable[[str], int], overlaps: bool = True) -> None:
        """overlaps: whether the host works while the device does; otherwise its seconds are added."""
        super().__init__(width)
        self._overlaps = overlaps
        self.correction = Correction()
        self._verified = 0
        self._host = 0.0
        """Seconds of a round in which the device waits for the host; decays while no round does."""
        self._busy = Mean(1.0, 1.0)
        """Share of rounds in which the device did not wait for the host: only these take longer with more work."""
        self._brought = 0.0
        """Worth of a verified draft in uncorrected seconds: its mean accepted tokens over the server's tokens/s."""
        self._behind: dict[str, Mean] = {}

    def observe(self, previous: RoundTime) -> None:
        super().observe(previous)
        self._verified = previous.rows
        for arm, requests in previous.drafted.items():
            self._behind.setdefault(arm, Mean()).add(previous.caught_up.get(arm, 0) / requests, MEMORY)
        if previous.seconds > 0.0:
            self._learn_host(previous)
            if (drafts := previous.rows - previous.requests) and self._rate:
                brought = max(previous.tokens - previous.requests, 0) / drafts / self._rate
                self._brought += (brought / self.correction.factor - self._brought) / RATE_ROUNDS
            expected = self.tables.verify(previous.rows, previous.requests, previous.context)
            expected += sum(
                self._pass(arm, requests, previous.limits.get(arm, 0))
                for arm, requests in previous.drafted.items()
            )
            expected += sum(self.tables.catch(arm, tokens) for arm, tokens in previous.caught_up.items())
            self.correction.add(expected, previous.seconds)
            self._pricing_rounds += 1

    def _learn_host(self, previous: RoundTime) -> None:
        waited = self._overlaps and previous.gap > WAITED * previous.seconds
        self._busy.add(not waited, RATE_ROUNDS)
        if waited:
            self._host += (previous.seconds + previous.gap - self._host) / 2
        else:
            self._host = min(self._host * FORGOTTEN, previous.seconds)

    def lasts(self, work: float) -> float:
        """Return the seconds of a round: the longer of device and host if they overlap, else their sum."""
        return max(work, self._host) if self._overlaps else work + self._gap

    def timings(self, arm: str) -> int:
        """Return the count of a well-known price: every price was measured at the start, so no probe is for prices."""
        return PROBE_ROUNDS

    def draft(self, arm: str, requests: int, drafts: int = 0) -> float:
        behind = self._behind.get(arm)
        catch_up = self.tables.catch(arm, requests * behind.value) if behind else 0.0
        return self.correction.factor * (self._pass(arm, requests, drafts) + catch_up)

    def lengths(self, arm: str) -> tuple[int, ...]:
        """Return the lengths that passes of `arm` were captured for, ascending."""
        return (*sorted(self.tables.shorter.get(arm, ())), *super().lengths(arm))

    def width(self, arm: str) -> float:
        return 1 + self.room(arm)

    def verify(self, rows: float, requests: int) -> float:
        return self.correction.factor * self._filled(requests, rows)[1]

    def worth(self, arm: str) -> Worth:
        """Return the worth of a further draft: a pass drafts its full length at once, so only the row has a price."""
        if not self._rate:
            return FULL_LENGTH
        return Worth(self._rate * self._busy.value * self._row(self._verified), 0.0)

    def fitted(self, arms: Iterable[str]) -> dict[tuple[str, str], float]:
        row = self._row(1)
        prices = {
            ("verify", ""): self.correction.factor * self.tables.verify(1, 1, self._context),
            ("verify_draft", ""): row,
            ("verify_request", ""): row,
            ("between", ""): self._gap,
        }
        for arm in arms:
            alone = self.draft(arm, 1)
            prices["draft", arm], prices["draft_request", arm] = alone, self.draft(arm, 2) - alone
        return prices

    def _pass(self, arm: str, requests: int, drafts: int = 0) -> float:
        """Return the uncorrected seconds of a pass, by default of the present limit."""
        return self.tables.draft(arm, requests, drafts or self._limits.get(arm, 0))

    def _filled(self, requests: int, rows: float) -> tuple[int, float]:
        """Return the rows that are verified in place of `rows`, and their uncorrected seconds with the loss of drafts
        that are left out.

        If `rows` exceed a graph's size by a few, the smaller graph is used if that costs less than the larger graph.
        The drafts left out are the least likely: each counts as `LEFT_OUT` prices of a row, or as the geometric mean of
        that price and what a draft usually brings if that is more, since rows may be nearly free.
        """
        verify, sizes = self.tables.verify, self.tables.verifications.at_short.sizes
        place = bisect_left(sizes, rows)
        seconds = verify(rows, requests, self._context)
        # Whether a round drafts at all is its route's decision, so some room for drafts is left.
        if place and (smaller := sizes[place - 1]) > requests:
            price = self.tables.row(rows, requests, self._context)
            each = max(LEFT_OUT * price, math.sqrt(price * self._brought))
            if (shorter := verify(smaller, requests, self._context) + (rows - smaller) * each) < seconds:
                return smaller, shorter
        return math.ceil(rows), seconds

    def packed(self, requests: int, drafts: int) -> int:
        return self._filled(requests, requests + drafts)[0] - requests if drafts else 0

    def _row(self, rows: float) -> float:
        return self.correction.factor * self.tables.row(rows, self._requests, self._context)

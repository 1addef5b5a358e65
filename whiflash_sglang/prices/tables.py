"""`Costs` of a device that works behind the host: tables of captured work that were measured at the start, and one slow
factor from the rounds that follow.

There the host's clock says how long launching took, so nothing is fitted to it.

A graph costs what it was captured for: 17 rows in a graph of 20 cost 20. So a price is looked up at the smallest size
that was measured and holds what is asked for, not interpolated between sizes. A verification also reads the context of
all its requests, long ones cut over the chip; it is measured at two sums of them, and sums between or beyond are on the
line through them.

Rounds show what the tables cannot know (clocks that drop, a neighbour, the host's share): their seconds over the
tables' price, as one factor for everything. It moves slowly, and at once if most of the last rounds agree that it is
wrong (:mod:`whiflash_sglang.prices.fits`), as the fitted prices of :mod:`.costs` do. Whole rounds are timed by the
device's events.
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
"""Share of a round's work: a longer gap says that the device waited for the host. Launches leave gaps, too."""

FORGOTTEN = 0.998
"""Share of the host's time that a round without waiting leaves: nobody knows by then whether it has become shorter."""

LONGEST = 60.0
"""Seconds; no pass takes as long."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Seconds by size. sizes: ascending. Beyond the last one the price grows in proportion. A file's are bounded."""

    sizes: tuple[Annotated[int, Field(gt=0, strict=True)], ...]
    seconds: tuple[Annotated[float, Field(gt=0, lt=LONGEST, strict=True)], ...]

    def __post_init__(self) -> None:
        ascending = self.sizes == tuple(sorted(set(self.sizes)))
        if not self.sizes or len(self.sizes) != len(self.seconds) or not ascending:
            raise ValueError(f"sizes must ascend and have a price each, got {self.sizes} and {self.seconds}")

    @classmethod
    def measured(cls, sizes: Iterable[int], price: Callable[[int], float]) -> "Sizes":
        """`price(size)` of each: more work is not faster, so a size costs at least what a smaller one does."""
        ordered = tuple(sorted(set(sizes)))
        return cls(ordered, tuple(accumulate(map(price, ordered), max)))

    def at(self, size: float) -> float:
        if size > self.sizes[-1]:
            return self.seconds[-1] * size / self.sizes[-1]
        return self.seconds[bisect_left(self.sizes, size)]

    def slope(self, size: float) -> float:
        """Seconds of one more at this size: the slope there of the lower convex hull of all prices.

        A single step would be free or dear by chance. Those that a larger size makes no dearer are passed over.
        """
        edges = _rising(self)
        place = bisect_left(edges, (size,))
        return edges[place][1] if place < len(edges) else self.seconds[-1] / self.sizes[-1]


@lru_cache
def _rising(prices: Sizes) -> list[tuple[float, ...]]:
    """Edges of the lower convex hull that rise: the size that each ends at, and its slope."""
    sizes, seconds, place, edges = prices.sizes, prices.seconds, 0, list[tuple[float, ...]]()
    while place < len(sizes) - 1:
        later = range(place + 1, len(sizes))
        slope, place = min(((seconds[i] - seconds[place]) / (sizes[i] - sizes[place]), i) for i in later)
        if slope > 0.0:
            edges.append((sizes[place], slope))
    return edges


@dataclass(frozen=True, slots=True)
class Verifications:
    """Seconds by rows, at two contexts (tokens of all requests together, `short` < `long`)."""

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
        """`price(rows, context)` of each of `sizes` at both contexts."""
        near = Sizes.measured(sizes, lambda rows: price(rows, short))
        far = Sizes.measured(sizes, lambda rows: price(rows, long))
        return cls(short, long, near, far)

    def at(self, rows: float, context: float) -> float:
        """Seconds for requests of `context` tokens together; fewer than `short` cost as `short` do."""
        return self._between(self.at_short.at(rows), self.at_long.at(rows), context)

    def slope(self, rows: float, context: float) -> float:
        """Seconds of one more row."""
        return self._between(self.at_short.slope(rows), self.at_long.slope(rows), context)

    def _between(self, near: float, far: float, context: float) -> float:
        share = max(context - self.short, 0.0) / (self.long - self.short)
        return near + share * max(far - near, 0.0)


LEFT_OUT = 2.0
"""Prices of a row that the least likely drafts of a batch are worth at least, if each is worth one at least."""


@dataclass(frozen=True, slots=True)
class CostTables:
    """A round's price, from what was captured.

    verifications: with rows spread over as many requests as a batch has. drafts, catch_up: arm → seconds by requests
    that draft, and by rows that are caught up. shorter: of passes that make fewer drafts, by how many. wider:
    verifications with more than so many rows for each request, for which attention takes a larger tile. plain: rounds
    without drafts, which have graphs of their own.
    """

    verifications: Verifications
    drafts: dict[str, Sizes]
    catch_up: dict[str, Sizes]
    shorter: dict[str, dict[int, Sizes]] = field(default_factory=dict)
    wider: dict[int, Verifications] = field(default_factory=dict)
    plain: Verifications | None = None

    def verify(self, rows: float, requests: int, context: float) -> float:
        """Seconds of a verification of so many rows, for requests of `context` tokens together."""
        if self.plain is not None and rows <= requests:
            return self.plain.at(rows, context)
        return self._by_width(rows, requests, lambda prices: prices.at(rows, context))

    def row(self, rows: float, requests: int, context: float) -> float:
        """Seconds of one more row, in the tile that is taken."""
        return self._by_width(rows, requests, lambda prices: prices.slope(rows, context))

    def _by_width(self, rows: float, requests: int, price: Callable[[Verifications], float]) -> float:
        """A price by rows of a request: if its mean is between two widths, some requests have each."""
        seconds, each = price(self.verifications), rows / max(requests, 1)
        for above, prices in self.wider.items():
            if each > above:
                seconds += min(each - above, 1.0) * (price(prices) - seconds)
        return seconds

    def draft(self, arm: str, requests: int, length: int = 0) -> float:
        """A pass, of `length` drafts if there are shorter ones of it. 0 for an arm that runs no model."""
        if not requests or arm not in self.drafts:
            return 0.0
        return self.shorter.get(arm, {}).get(length, self.drafts[arm]).at(requests)

    def catch(self, arm: str, tokens: float) -> float:
        """0 for an arm that keeps no KV."""
        return self.catch_up[arm].at(tokens) if tokens and arm in self.catch_up else 0.0


class LookedUpCosts(Costs):
    """Prices from `tables`, which must be set before anything is priced.

    A round pads its verification to the drafts that it makes room for, so that is what rows are looked up by.
    """

    tables: CostTables
    priced_by = "rounds"
    """Plain rounds of every size were timed at the start, and any rounds correct all prices by one factor."""

    def __init__(self, width: Callable[[str], int], overlaps: bool = True) -> None:
        """overlaps: whether the host works beside the device; else its time comes on top."""
        super().__init__(width)
        self._overlaps = overlaps
        self.correction = Correction()
        self._verified = 0
        self._host = 0.0
        """Seconds of a round that waits for the host, as far as one is known; forgotten where none does."""
        self._busy = Mean(1.0, 1.0)
        """Share of rounds in which the device did not wait, which longer work makes longer."""
        self._brought = 0.0
        """Seconds, uncorrected, in which the server commits what one draft of a round usually brings."""
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
            expected += sum(self._pass(arm, requests) for arm, requests in previous.drafted.items())
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
        """The longer of host and device decides."""
        return max(work, self._host) if self._overlaps else work + self._gap

    def timings(self, arm: str) -> int:
        """Every price was measured, and what is corrected is all of them at once: no arm is tried for its own."""
        return PROBE_ROUNDS

    def draft(self, arm: str, requests: int, drafts: int = 0) -> float:
        behind = self._behind.get(arm)
        catch_up = self.tables.catch(arm, requests * behind.value) if behind else 0.0
        return self.correction.factor * (self._pass(arm, requests, drafts) + catch_up)

    def lengths(self, arm: str) -> tuple[int, ...]:
        """Those that passes were captured for."""
        return (*sorted(self.tables.shorter.get(arm, ())), *super().lengths(arm))

    def width(self, arm: str) -> float:
        return 1 + self.room(arm)

    def verify(self, rows: float, requests: int) -> float:
        return self.correction.factor * self._filled(requests, rows)[1]

    def worth(self, arm: str) -> Worth:
        """A pass drafts as many as it may at once, so a further draft costs its row only."""
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
        """Uncorrected."""
        return self.tables.draft(arm, requests, drafts or self._limits.get(arm, 0))

    def _filled(self, requests: int, rows: float) -> tuple[int, float]:
        """Rows that are verified in place of `rows`, and seconds, uncorrected, with what is lost by those left out.

        A graph of a few rows more than the one before it is not begun: the step costs more than its drafts bring. Those
        left out are the least likely, so each is worth little more than a row costs; if rows are nearly free,
        it is the geometric mean of that and what a draft usually brings.
        """
        verify, sizes = self.tables.verify, self.tables.verifications.at_short.sizes
        place = bisect_left(sizes, rows)
        seconds = verify(rows, requests, self._context)
        if place and (smaller := sizes[place - 1]) >= requests:
            price = self.tables.row(rows, requests, self._context)
            each = max(LEFT_OUT * price, math.sqrt(price * self._brought))
            if (shorter := verify(smaller, requests, self._context) + (rows - smaller) * each) < seconds:
                return smaller, shorter
        return math.ceil(rows), seconds

    def packed(self, requests: int, drafts: int) -> int:
        return self._filled(requests, requests + drafts)[0] - requests if drafts else 0

    def _row(self, rows: float) -> float:
        return self.correction.factor * self.tables.row(rows, self._requests, self._context)

"""`Costs` for a device that works behind the host: tables of captured work that were measured at the start, and one
slow factor from the rounds that follow.

There the host's clock says how long launching took, so nothing is fitted to it.

A graph costs what it was captured for: 17 rows in a graph of 20 cost 20. So a price is looked up at the smallest size
that was measured and holds what is asked for, not interpolated between sizes. A verification also reads the context of
all its requests; it is measured at two sums of them, and sums between or beyond are on the line through them.

Rounds show what the tables cannot know (clocks that drop, a neighbour, the host's share): their seconds over the
tables' price, as one factor for everything. It moves slowly, and at once if most of the last rounds agree that it is
wrong (:mod:`whiflash_sglang.prices.fits`), as the fitted prices of :mod:`.costs` do. Whole rounds are timed by the
device's events.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from whiflash_sglang.drafts.rates import Mean
from whiflash_sglang.prices.costs import FULL_LENGTH, PROBE_ROUNDS, WorkerCosts, Worth
from whiflash_sglang.prices.fits import MEMORY, DriftDetector, within
from whiflash_sglang.prices.round_clock import RoundTime


@dataclass(frozen=True, slots=True)
class Sizes:
    """Seconds by size. sizes: ascending. Beyond the last one the price grows in proportion."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if (
            not self.sizes
            or len(self.sizes) != len(self.seconds)
            or list(self.sizes) != sorted(set(self.sizes))
        ):
            raise ValueError(f"sizes must ascend and have a price each, got {self.sizes} and {self.seconds}")

    @classmethod
    def measured(cls, sizes: Iterable[int], price: Callable[[int], float]) -> "Sizes":
        """`price(size)` of each: more work is not faster, so a size costs at least what a smaller one does."""
        ordered = tuple(sorted(set(sizes)))
        return cls(ordered, tuple(accumulate(map(price, ordered), max)))

    def at(self, size: float) -> float:
        index = bisect_left(self.sizes, size)
        if index < len(self.sizes):
            return self.seconds[index]
        return self.seconds[-1] * size / self.sizes[-1]


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
        cls, short: int, long: int, sizes: Iterable[int], price: Callable[[int, int], float]
    ) -> "Verifications":
        """`price(rows, context)` of each of `sizes` at both contexts."""
        rows = list(sizes)

        def at(context: int) -> Sizes:
            return Sizes.measured(rows, lambda size: price(size, context))

        return cls(short, long, at(short), at(long))

    def at(self, rows: float, context: float) -> float:
        """Seconds for requests of `context` tokens together; fewer than `short` cost as `short` do."""
        near, far = self.at_short.at(rows), self.at_long.at(rows)
        share = max(context - self.short, 0.0) / (self.long - self.short)
        return near + share * max(far - near, 0.0)


@dataclass(slots=True)
class Correction:
    """The ratio of rounds' seconds to the tables'."""

    factor: float = 1.0
    _weight: float = 0.0
    _watch: DriftDetector = field(default_factory=DriftDetector)

    def add(self, expected: float, seconds: float) -> None:
        """A round that the tables, uncorrected, priced at `expected` took `seconds`."""
        if expected <= 0.0 or seconds <= 0.0:
            raise ValueError(f"a round takes time: expected {expected} s, took {seconds} s")
        ratio = seconds / expected
        self.factor *= self._watch.judge(ratio / self.factor)
        self._weight = self._weight * (1.0 - 1.0 / MEMORY) + 1.0
        self.factor += (within(ratio, self.factor) - self.factor) / max(self._weight, 2.0)


@dataclass(slots=True)
class CostTables:
    """A round's price, from what was captured.

    drafts, catch_up: arm → seconds by requests that draft, and by rows that are caught up. shorter: of passes that
    make fewer drafts, by how many. lengths: drafts that the passes of an arm make now, if they are shorter ones.
    """

    verifications: Verifications
    drafts: dict[str, Sizes]
    catch_up: dict[str, Sizes]
    correction: Correction = field(default_factory=Correction)
    shorter: dict[str, dict[int, Sizes]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)

    def verify(self, rows: float, context: float) -> float:
        return self.correction.factor * self.verifications.at(rows, context)

    def draft(self, arm: str, requests: int) -> float:
        """0 for an arm that runs no model."""
        return self.correction.factor * self._drafts(arm, requests)

    def catch(self, arm: str, tokens: float) -> float:
        """0 for an arm that keeps no KV."""
        return self.correction.factor * self._catch(arm, tokens)

    def row(self, rows: float, context: float) -> float:
        """The price of one more row at this load: the slope to the next measured size, as rows fill it evenly."""
        sizes = self.verifications.at_short.sizes
        upper = sizes[min(bisect_left(sizes, rows + 1), len(sizes) - 1)]
        lower = sizes[max(bisect_left(sizes, upper) - 1, 0)]
        if upper == lower:
            return self.verify(upper, context) / upper
        return (self.verify(upper, context) - self.verify(lower, context)) / (upper - lower)

    def took(self, time: RoundTime) -> None:
        """Correct the prices by a whole round."""
        expected = self.verifications.at(time.rows, time.context)
        expected += sum(self._drafts(arm, requests) for arm, requests in time.drafted.items())
        expected += sum(self._catch(arm, tokens) for arm, tokens in time.caught_up.items())
        self.correction.add(expected, time.seconds)

    def _drafts(self, arm: str, requests: int) -> float:
        if not requests or arm not in self.drafts:
            return 0.0
        return self.shorter.get(arm, {}).get(self.lengths.get(arm, 0), self.drafts[arm]).at(requests)

    def _catch(self, arm: str, tokens: float) -> float:
        return self.catch_up[arm].at(tokens) if tokens and arm in self.catch_up else 0.0


def continuing(mean: float, most: int) -> float:
    """The chance r that a draft is followed by another, if of up to `most` there are `mean`: 1 + r + … + r^(most-1)."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(most)) < mean else (low, middle)
    return low


class LookedUpCosts(WorkerCosts):
    """Prices from `tables`, which must be set before anything is priced.

    A round pads its verification to the drafts that it makes room for, so that is what rows are looked up by.
    """

    tables: CostTables
    knows_plain = True

    def __init__(self, width: Callable[[str], int]) -> None:
        super().__init__(width)
        self._verified = 0
        self._behind: dict[str, Mean] = {}

    def observe(self, previous: RoundTime) -> None:
        self._verified = previous.rows
        for arm, requests in previous.drafted.items():
            self._behind.setdefault(arm, Mean()).add(previous.caught_up.get(arm, 0) / requests, MEMORY)
        self.committed(previous.tokens, previous.seconds, previous.gap)
        if previous.seconds > 0.0:
            self.tables.took(previous)

    def timings(self, arm: str) -> int:
        """Every price was measured, and what is corrected is all of them at once: no arm is tried for its own."""
        return PROBE_ROUNDS

    def draft(self, arm: str, requests: int) -> float:
        behind = self._behind.get(arm)
        catch_up = self.tables.catch(arm, requests * behind.value) if behind else 0.0
        return self.tables.draft(arm, requests) + catch_up

    def length(self, arm: str, requests: int, most: int) -> int:
        """The length whose time and whose loss are least. Lost are drafts behind its end that would have been kept, as
        if each were right, so that a pass is shortened only if that pays for certain.
        """
        tables, shorter = self.tables, self.tables.shorter.get(arm)
        if not shorter or not self._rate or arm not in self._drafts:
            tables.lengths.pop(arm, None)
            return most
        goes_on = continuing(self._drafts[arm][0].value, tables.lengths.get(arm, most))

        def costs(length: int) -> float:
            tables.lengths[arm] = length
            lost = requests * sum(goes_on**i for i in range(length, most))
            return lost + self._rate * tables.draft(arm, requests)

        tables.lengths[arm] = min((most, *shorter), key=costs)
        return tables.lengths[arm]

    def width(self, arm: str) -> float:
        return 1 + self.room(arm)

    def verify(self, rows: float, requests: int) -> float:
        return self.tables.verify(rows, self._context) + self._gap

    def worth(self, arm: str) -> Worth:
        """A pass drafts its full length at once, so a further draft costs its row alone."""
        if not self._rate:
            return FULL_LENGTH
        return Worth(self._rate * self.tables.row(self._verified, self._context), 0.0)

    def fitted(self, arms: Iterable[str]) -> dict[tuple[str, str], float]:
        row = self.tables.row(1, self._context)
        prices = {
            ("verify", ""): self.tables.verify(1, self._context),
            ("verify_draft", ""): row,
            ("verify_request", ""): row,
            ("between", ""): self._gap,
        }
        for arm in arms:
            alone = self.draft(arm, 1)
            prices["draft", arm], prices["draft_request", arm] = alone, self.draft(arm, 2) - alone
        return prices

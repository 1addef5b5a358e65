"""Fits of measured seconds that follow a machine's speed but not single slow moments. Imports nothing of the server."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WINDOW = 7
"""Last observations of which most must agree before a price jumps: three slow ones in a row move nothing."""

LIMIT = 3.0
"""Largest factor between an observation and its expectation; an observation beyond it is clamped."""

DRIFT = 1.6
"""Factor between the median of the window and the expectation above which the price jumps. With lognormal noise of
deviation 0.3 the median of seven is as far off about once in 2,000 rounds, with 0.2 never.
"""

CHEAPER = 0.5
"""An observation below this share of its expectation shows a wrong price: much can slow work down for a moment, but
nothing makes it so much faster.
"""

MEMORY = 200.0
"""Rounds after which an old measurement counts for little; machines get slower and faster while they serve."""

STIFFNESS = 10.0
"""Weight of a prior slope, in the unit of the data: number of rounds times the variance of their counts."""


def median(values: Sequence[float]) -> float:
    """Return the median, the lower one of two: too slow is the more likely error. values: at least one."""
    return sorted(values)[(len(values) - 1) // 2]


def within(seconds: float, expected: float) -> float:
    """Return `seconds`, clamped to between 1/`LIMIT` and `LIMIT` times `expected`."""
    return min(max(seconds, expected / LIMIT), expected * LIMIT)


class DriftDetector:
    """Detects from the last `WINDOW` ratios of observed to expected seconds that the expectation is wrong.

    The first ratio of a `Fit` is 1, so a second observation that is far lower corrects the first, and one that is far
    higher does not (`median`).
    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=WINDOW)

    def judge(self, ratio: float) -> float:
        """Add the ratio of an observation. Return the factor by which the expectation is wrong, 1 if it is not."""
        self._ratios.append(ratio)
        off = median(self._ratios)
        if 1 / DRIFT <= off <= DRIFT:
            return 1.0
        self._ratios = deque((kept / off for kept in self._ratios), maxlen=WINDOW)
        return off


@dataclass(slots=True)
class Correction:
    """Learns the ratio of rounds' seconds to their expected seconds, `factor`."""

    factor: float = 1.0
    _weight: float = 0.0
    _watch: DriftDetector = field(default_factory=DriftDetector)

    def add(self, expected: float, seconds: float) -> None:
        """Learn that a round with an uncorrected price of `expected` seconds took `seconds`; both above 0."""
        ratio = seconds / expected
        self.factor *= self._watch.judge(ratio / self.factor)
        self._weight = self._weight * (1.0 - 1.0 / MEMORY) + 1.0
        self.factor += (within(ratio, self.factor) - self.factor) / max(self._weight, 2.0)


class Fit:
    """Fits seconds ≈ a + b·x by decayed least squares; x are the counts of some kinds of work.

    While there is little data the slopes b stay near their priors. No slope is negative, since more work is never
    faster. slopes: seconds that one more of each kind costs.

    Args:
        prior: mean seconds → prior slopes. stiffness: weight of each prior (`STIFFNESS`). least: smallest slopes, as
            shares of the mean seconds; a smaller slope counts as 0. Empty: all 0. first: seconds at the counts `at`,
            before the first observation.
    """

    def __init__(
        self,
        prior: Callable[[float], Sequence[float]],
        stiffness: Sequence[float] = (STIFFNESS,),
        least: Sequence[float] = (),
        first: float = 0.0,
        at: Sequence[float] = (0.0,),
    ) -> None:
        kinds = len(stiffness)
        self._prior, self._stiffness = prior, stiffness
        self._least = least or (0.0,) * kinds
        self._w = self._y = 0.0
        self._x, self._xy = [0.0] * kinds, [0.0] * kinds
        self._xx = [[0.0] * kinds for _ in range(kinds)]
        self._watch = DriftDetector()
        self._mean, self._counts, self.slopes = first, at, prior(first)

    def add(self, counts: Sequence[float], seconds: float) -> bool:
        """Add an observation. Return whether the price was wrong: most last ones differ, or this one took far less."""
        expected = self.at(counts) if self._w else seconds
        off = self._watch.judge(seconds / expected)
        keep, y = 1.0 - 1.0 / MEMORY, within(seconds, expected * off)
        self._w = self._w * keep + 1.0
        self._y = self._y * off * keep + y
        # Lists: after a forward, which empties the CPU caches, arrays of three numbers take 2.6 times as long.
        for kind, (x, row) in enumerate(zip(counts, self._xx, strict=True)):
            self._x[kind] = self._x[kind] * keep + x
            self._xy[kind] = self._xy[kind] * off * keep + x * y
            row[:] = [sum_ * keep + x * other for sum_, other in zip(row, counts, strict=True)]
        self._mean, self._counts = self._y / self._w, [x / self._w for x in self._x]
        self.slopes = self._fitted()
        return off != 1.0 or seconds < expected * CHEAPER

    def _fitted(self) -> Sequence[float]:
        """Solve for the slopes: ridge regression towards the prior, on centred sums. Slopes below `least` become 0."""
        prior, least = self._prior(self._mean), [share * self._mean for share in self._least]
        rows, free = list[list[float]](), list(range(len(least)))
        for kind, (mean, stiffness) in enumerate(zip(self._counts, self._stiffness, strict=True)):
            row = [xx - mean * x for xx, x in zip(self._xx[kind], self._x, strict=True)]
            row[kind] += stiffness
            rows.append([*row, self._xy[kind] - mean * self._y + stiffness * prior[kind]])
        while True:
            solved = _solved([[rows[i][j] for j in (*free, -1)] for i in free])
            slopes = dict(zip(free, solved, strict=True))
            short = [kind for kind in free if slopes[kind] < least[kind]]
            if not short:
                return [slopes.get(kind, 0.0) for kind in range(len(rows))]
            free.remove(min(short, key=lambda kind: slopes[kind] - least[kind]))

    def at(self, counts: Sequence[float]) -> float:
        """Return the expected seconds of work with these counts, at least a tenth of the measured mean."""
        each = zip(self.slopes, counts, self._counts, strict=True)
        return max(self._mean + sum(b * (count - mean) for b, count, mean in each), 0.1 * self._mean)


def _solved(rows: list[list[float]]) -> list[float]:
    """Solve Ax = b for x, A positive definite. rows: those of A, each followed by its number of b; overwritten."""
    for place, row in enumerate(rows):
        for other in rows:
            if other is not row:
                other[:] = [a - b * other[place] / row[place] for a, b in zip(other, row, strict=True)]
    return [row[-1] / row[place] for place, row in enumerate(rows)]

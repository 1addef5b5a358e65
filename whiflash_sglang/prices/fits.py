"""Fits of measured seconds that follow a machine and pass over its slow moments. Imports nothing of the server."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WINDOW = 7
"""Observations of which most must agree before a level is moved at once: three slow moments in a row move nothing."""

LIMIT = 3.0
"""An observation counts as at most so many times what was expected, and as no less than that part of it."""

DRIFT = 1.6
"""A level that most of the window is off by more than this factor was wrong. The median of seven is as far off about
once in 2,000 rounds with lognormal noise of deviation 0.3, and never with 0.2.
"""

CHEAPER = 0.5
"""An observation below this part of what was expected is a reason to look again soon: nothing makes work so much
faster for a moment, but much makes it slower.
"""

MEMORY = 200.0
"""Rounds after which an old measurement counts for little; machines get slower and faster while they serve."""

STIFFNESS = 10.0
"""How much data a prior slope counts for: rounds times the spread of what they differ in."""


def median(values: Sequence[float]) -> float:
    """The lower of two in the middle: what is too slow is the more likely error. At least one value."""
    return sorted(values)[(len(values) - 1) // 2]


def within(seconds: float, expected: float) -> float:
    """`seconds`, no further from `expected` than `LIMIT` allows."""
    return min(max(seconds, expected / LIMIT), expected * LIMIT)


class DriftDetector:
    """Observations over what was expected of them, the last `WINDOW`.

    A first observation agrees with itself, so a second one that took far less corrects it, and one that took far longer
    does not.
    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=WINDOW)

    def judge(self, ratio: float) -> float:
        """One more observation. Returns the factor by which the expectation was wrong, 1 for nearly all."""
        self._ratios.append(ratio)
        off = median(self._ratios)
        if 1 / DRIFT <= off <= DRIFT:
            return 1.0
        self._ratios = deque((kept / off for kept in self._ratios), maxlen=WINDOW)
        return off


@dataclass(slots=True)
class Correction:
    """The ratio of rounds' seconds to those that were expected."""

    factor: float = 1.0
    _weight: float = 0.0
    _watch: DriftDetector = field(default_factory=DriftDetector)

    def add(self, expected: float, seconds: float) -> None:
        """A round that was expected to take `expected`, uncorrected, took `seconds`; both above 0."""
        ratio = seconds / expected
        self.factor *= self._watch.judge(ratio / self.factor)
        self._weight = self._weight * (1.0 - 1.0 / MEMORY) + 1.0
        self.factor += (within(ratio, self.factor) - self.factor) / max(self._weight, 2.0)


class Fit:
    """seconds ≈ a + b·x by decayed least squares, x the counts of some kinds of work.

    The slopes b are pulled towards priors while there is little data, and none is negative: more work is not faster,
    only noise says so. slopes: seconds that one more of each kind costs.

    Args:
        prior: slopes where the mean is so many seconds. stiffness: how much data each counts for (`STIFFNESS`). least:
            shares of the mean; a slope below its own is none. Empty: 0. first: seconds of the counts `at`, before the
            first observation.
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
        """Returns whether what was expected turned out wrong: most of the last ones differ, or this took far less."""
        expected = self.at(counts) if self._w else seconds
        off = self._watch.judge(seconds / expected)
        keep, y = 1.0 - 1.0 / MEMORY, within(seconds, expected * off)
        self._w = self._w * keep + 1.0
        self._y = self._y * off * keep + y
        # Lists: behind a forward, which empties the caches, arrays of three numbers take 2.6 times as long.
        for kind, (x, row) in enumerate(zip(counts, self._xx, strict=True)):
            self._x[kind] = self._x[kind] * keep + x
            self._xy[kind] = self._xy[kind] * off * keep + x * y
            row[:] = [sum_ * keep + x * other for sum_, other in zip(row, counts, strict=True)]
        self._mean, self._counts = self._y / self._w, [x / self._w for x in self._x]
        self.slopes = self._fitted()
        return off != 1.0 or seconds < expected * CHEAPER

    def _fitted(self) -> Sequence[float]:
        """Ridge regression of the centred sums towards the prior; of fits that do not fall, the best."""
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
        """Seconds, never below a tenth of the mean that was measured."""
        each = zip(self.slopes, counts, self._counts, strict=True)
        return max(self._mean + sum(b * (count - mean) for b, count, mean in each), 0.1 * self._mean)


def _solved(rows: list[list[float]]) -> list[float]:
    """x of Ax = b, A positive definite. rows: of A, each with its number of b behind; used up."""
    for place, row in enumerate(rows):
        for other in rows:
            if other is not row:
                other[:] = [a - b * other[place] / row[place] for a, b in zip(other, row, strict=True)]
    return [row[-1] / row[place] for place, row in enumerate(rows)]

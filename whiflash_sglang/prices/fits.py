"""Fits of measured seconds that follow a machine and pass over its slow moments. Imports nothing of the server."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

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
        self._prior, self._stiffness = prior, np.array(stiffness)
        self._least = np.array(least) if least else np.zeros(kinds)
        self._w = self._y = 0.0
        self._x, self._xy, self._xx = np.zeros(kinds), np.zeros(kinds), np.zeros((kinds, kinds))
        self._watch = DriftDetector()
        self._mean, self._counts, self.slopes = first, at, prior(first)

    def add(self, counts: Sequence[float], seconds: float) -> bool:
        """Returns whether what was expected turned out wrong: most of the last ones differ, or this took far less."""
        expected = self.at(counts) if self._w else seconds
        off = self._watch.judge(seconds / expected)
        keep, y, x = 1.0 - 1.0 / MEMORY, within(seconds, expected * off), np.array(counts, dtype=float)
        self._w = self._w * keep + 1.0
        self._y = self._y * off * keep + y
        self._x = self._x * keep + x
        self._xy = self._xy * (off * keep) + x * y
        self._xx = self._xx * keep + np.outer(x, x)
        self._mean, self._counts = self._y / self._w, (self._x / self._w).tolist()
        self.slopes = self._fitted()
        return off != 1.0 or seconds < expected * CHEAPER

    def _fitted(self) -> Sequence[float]:
        """Ridge regression of the centred sums towards the prior; of fits that do not fall, the best."""
        spread = self._xx - np.outer(self._x, self._x) / self._w + np.diag(self._stiffness)
        pull = self._xy - self._x * self._y / self._w + self._stiffness * self._prior(self._mean)
        slopes, free, least = np.zeros(len(pull)), list(range(len(pull))), self._least * self._mean
        while free:
            slopes[free] = np.linalg.solve(spread[np.ix_(free, free)], pull[free])
            lowest = min(free, key=(slopes - least).__getitem__)
            if slopes[lowest] >= least[lowest]:
                break
            slopes[lowest] = 0.0
            free.remove(lowest)
        fitted: list[float] = slopes.tolist()
        return fitted

    def at(self, counts: Sequence[float]) -> float:
        """Seconds, never below a tenth of the mean that was measured."""
        each = zip(self.slopes, counts, self._counts, strict=True)
        return max(self._mean + sum(b * (count - mean) for b, count, mean in each), 0.1 * self._mean)

"""Fits of measured seconds: a line, and a plane, of which neither falls. Imports nothing of the server."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WINDOW = 7
"""Observations of which most must agree before a level is moved at once: three slow moments in a row move nothing."""

LIMIT = 3.0
"""An observation counts as at most so many times what was expected, and as no less than that part of it."""

LEAST_STEP = 0.25
"""A share of a verification's mean: a step from one row to several that is smaller is none."""

DRIFT = 1.6
"""A level that most of the window is off by more than this factor was wrong. The median of seven is as far off about
once in 2,000 rounds with lognormal noise of deviation 0.3, and never with 0.2.
"""

CHEAPER = 0.5
"""An observation below this part of what was expected is a reason to look again soon: nothing makes work so much
faster for a moment, but much makes it slower.
"""


def median(values: Sequence[float]) -> float:
    """The lower of two in the middle: what is too slow is the more likely error. At least one value."""
    return sorted(values)[(len(values) - 1) // 2]


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


def within(seconds: float, expected: float) -> float:
    """`seconds`, no further from `expected` than `LIMIT` allows."""
    return min(max(seconds, expected / LIMIT), expected * LIMIT)


MEMORY = 200.0
"""Rounds after which an old measurement counts for little; machines get slower and faster while they serve."""

STIFFNESS = 10.0
"""How much data a prior slope counts for: rounds times the spread of what they differ in."""

PLANE_STIFFNESS = np.array((STIFFNESS, STIFFNESS, 1.0))
"""The same of a draft, a request and the step between one row and several: their spread is a quarter at most."""


@dataclass(slots=True)
class Line:
    """seconds ≈ a + b·x by decayed least squares; b is pulled towards `prior_b` while there is little data.

    The slope is never negative: more work is not faster, only noise says so. Something must have been added.
    """

    prior_b: float
    _w: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0
    _watch: DriftDetector = field(default_factory=DriftDetector)

    def add(self, x: float, seconds: float) -> bool:
        """Returns whether what was expected turned out wrong: most of the last ones differ, or this took far less."""
        expected = self.at(x) if self._w else seconds
        off = self._watch.judge(seconds / expected)
        self._y, self._xy = self._y * off, self._xy * off
        y, keep = within(seconds, expected * off), 1.0 - 1.0 / MEMORY
        self._w = self._w * keep + 1.0
        self._x = self._x * keep + x
        self._y = self._y * keep + y
        self._xx = self._xx * keep + x * x
        self._xy = self._xy * keep + x * y
        return off != 1.0 or seconds < expected * CHEAPER

    @property
    def slope(self) -> float:
        """Seconds that one more of x costs."""
        mean_x, mean_y = self._x / self._w, self._y / self._w
        spread = self._xx / self._w - mean_x * mean_x
        if spread <= 1e-6:
            return self.prior_b
        fitted = (self._xy / self._w - mean_x * mean_y) / spread
        trust = self._w * spread / (self._w * spread + STIFFNESS)
        return max(0.0, trust * fitted + (1 - trust) * self.prior_b)

    def at(self, x: float) -> float:
        """Seconds at `x`, never below a tenth of the mean that was measured."""
        mean_x, mean_y = self._x / self._w, self._y / self._w
        return max(mean_y + self.slope * (x - mean_x), mean_y * 0.1)


class Plane:
    """seconds ≈ a + b·drafts + c·requests + d·[one request, with drafts], fitted like `Line`.

    A busy server verifies more drafts *and* serves more requests: on one line a draft would be charged for both. One
    row is another product than several: in float32 on two cores a second row made rounds 1.6 times as long, and eight
    more did not. A step below `LEAST_STEP` is none: drafts' slopes say as much, and packed bfloat16 weights have none.
    Before there is data a draft and a request each cost `share` of the mean, the step nothing.
    """

    def __init__(self, first: float, share: float) -> None:
        self._first, self._share = first, share
        self._w, self._y = 0.0, 0.0
        self._x, self._xy, self._xx = np.zeros(3), np.zeros(3), np.zeros((3, 3))
        self._watch = DriftDetector()
        self.slopes = first * share, first * share, 0.0
        """Seconds that one more draft, one more request, and the first draft of a single request cost."""

    def add(self, drafts: float, requests: float, seconds: float) -> None:
        expected = self.at(drafts, requests) if self._w else seconds
        off = self._watch.judge(seconds / expected)
        keep, y = 1.0 - 1.0 / MEMORY, within(seconds, expected * off)
        x = np.array((drafts, requests, drafts > 0 and requests == 1), dtype=float)
        self._w = self._w * keep + 1.0
        self._y = self._y * off * keep + y
        self._x = self._x * keep + x
        self._xy = self._xy * (off * keep) + x * y
        self._xx = self._xx * keep + np.outer(x, x)
        self.slopes = self._fitted()

    def _fitted(self) -> tuple[float, float, float]:
        """Ridge regression of the centred sums towards the prior; of planes that do not fall, the best."""
        prior = self._share * self._y / self._w
        spread = self._xx - np.outer(self._x, self._x) / self._w + np.diag(PLANE_STIFFNESS)
        pull = self._xy - self._x * self._y / self._w + PLANE_STIFFNESS * (prior, prior, 0.0)
        slopes, free = np.zeros(3), [0, 1, 2]
        least = np.array((0.0, 0.0, LEAST_STEP * self._y / self._w))
        while free:
            slopes[free] = np.linalg.solve(spread[np.ix_(free, free)], pull[free])
            lowest = min(free, key=(slopes - least).__getitem__)
            if slopes[lowest] >= least[lowest]:
                break
            slopes[lowest] = 0.0
            free.remove(lowest)
        draft, request, step = map(float, slopes)
        return draft, request, step

    def at(self, drafts: float, requests: float) -> float:
        """Seconds, never below a tenth of the mean that was measured."""
        draft, request, step = self.slopes
        if not self._w:
            return self._first + draft * drafts + request * (requests - 1)
        mean = self._y / self._w
        mean_drafts, mean_requests, mean_step = (self._x / self._w).tolist()
        added = draft * (drafts - mean_drafts) + request * (requests - mean_requests)
        seconds: float = mean + added + step * ((drafts > 0 and requests == 1) - mean_step)
        return max(seconds, 0.1 * mean)

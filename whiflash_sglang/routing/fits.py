"""Fits of measured seconds: a line, and a plane, of which neither falls. Imports nothing of the server."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW = 7
"""Observations of which most must agree before a level is moved at once: three slow moments in a row move nothing."""

LIMIT = 3.0
"""An observation counts as at most so many times what was expected, and as no less than that part of it."""

DRIFT = 1.6
"""A level that most of the window is off by more than this factor was wrong. Of lognormal noise with a deviation of
0.3 the median of seven is as far off about once in 2,000 rounds; 0.2 never does it.
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
    """seconds ≈ a + b·drafts + c·requests, fitted like `Line`.

    A busy server verifies more drafts *and* serves more requests: on one line a draft would be charged for both. Before
    there is data a draft and a request each cost `share` of the mean.
    """

    def __init__(self, first: float, share: float) -> None:
        self._first, self._share = first, share
        self._sums = [0.0] * 9
        self._watch = DriftDetector()

    def add(self, drafts: float, requests: float, seconds: float) -> None:
        expected = self.at(drafts, requests) if self._sums[0] else seconds
        off = self._watch.judge(seconds / expected)
        for with_seconds in (3, 7, 8):
            self._sums[with_seconds] *= off
        keep, x, z, y = 1.0 - 1.0 / MEMORY, drafts, requests, within(seconds, expected * off)
        new = (1.0, x, z, y, x * x, z * z, x * z, x * y, z * y)
        self._sums = [old * keep + value for old, value in zip(self._sums, new, strict=True)]

    @property
    def slopes(self) -> tuple[float, float]:
        """Seconds that one more draft and one more request cost."""
        w, x, z, y, xx, zz, xz, xy, zy = self._sums
        if not w:
            return self._first * self._share, self._first * self._share
        prior = self._share * y / w
        # Ridge regression of the centred sums towards the prior.
        sxx, szz, sxz = xx - x * x / w + STIFFNESS, zz - z * z / w + STIFFNESS, xz - x * z / w
        rx, rz = xy - x * y / w + STIFFNESS * prior, zy - z * y / w + STIFFNESS * prior
        determinant = sxx * szz - sxz * sxz
        draft, request = (rx * szz - rz * sxz) / determinant, (rz * sxx - rx * sxz) / determinant
        if draft >= 0 and request >= 0:
            return draft, request
        # The best plane that does not fall rests on one of the axes.
        if request < 0 < rx:
            return rx / sxx, 0.0
        return 0.0, max(0.0, rz / szz)

    def at(self, drafts: float, requests: float) -> float:
        """Seconds, never below a tenth of the mean that was measured."""
        w, x, z, y = self._sums[:4]
        draft, request = self.slopes
        if not w:
            return self._first + draft * drafts + request * (requests - 1)
        return max(y / w + draft * (drafts - x / w) + request * (requests - z / w), 0.1 * y / w)

"""Tells a slow moment from a slower machine. Imports nothing of the server."""

from collections import deque
from collections.abc import Sequence

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


class Watch:
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

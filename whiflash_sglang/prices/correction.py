"""The factor by which prices follow a machine's speed, but not single slow moments. Imports nothing of the server."""

from collections import deque
from collections.abc import Sequence

WINDOW = 7
"""Last observations of which most must agree before a price jumps: three slow ones in a row move nothing."""

LIMIT = 3.0
"""Largest factor between an observation and its expectation; an observation beyond it is clamped."""

DRIFT = 1.6
"""Factor between the median of the window and the expectation above which the price jumps. With lognormal noise of
deviation 0.3 the median of seven is as far off about once in 2,000 rounds, with 0.2 never.
"""

MEMORY = 200.0
"""Rounds after which an old measurement counts for little; machines get slower and faster while they serve."""


def median(values: Sequence[float]) -> float:
    """Return the median; of two middle values the lower one, since outliers are mostly too slow. values: not empty."""
    return sorted(values)[(len(values) - 1) // 2]


class Correction:
    """Learns `factor`, the ratio of rounds' seconds to their expected seconds.

    It moves slowly, and at once if the median of the last `WINDOW` rounds is off by more than `DRIFT`.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._weight = 0.0
        self._ratios: deque[float] = deque(maxlen=WINDOW)
        """Seconds of the last rounds over their corrected price."""

    def add(self, expected: float, seconds: float) -> None:
        """Learn that a round with an uncorrected price of `expected` seconds took `seconds`; both above 0."""
        ratio = seconds / expected
        self._ratios.append(ratio / self.factor)
        off = median(self._ratios)
        if not 1 / DRIFT <= off <= DRIFT:
            self.factor *= off
            self._ratios = deque((each / off for each in self._ratios), maxlen=WINDOW)
        self._weight = self._weight * (1.0 - 1.0 / MEMORY) + 1.0
        bounded = min(max(ratio, self.factor / LIMIT), self.factor * LIMIT)
        self.factor += (bounded - self.factor) / max(self._weight, 2.0)

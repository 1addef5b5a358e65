"""Latencies that the worker measures itself: a line per stage, refitted with every round."""

from collections.abc import Callable
from dataclasses import dataclass

MEMORY = 200.0
"""Rounds after which an old measurement counts for little; machines get slower and faster while they serve."""


@dataclass(slots=True)
class Line:
    """seconds ≈ a + b·x by decayed least squares, pulled towards a prior while there is little data.

    The slope is never negative: more work is not faster, only noise says so.
    """

    prior_a: float
    prior_b: float
    _w: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def add(self, x: float, seconds: float) -> None:
        keep = 1.0 - 1.0 / MEMORY
        self._w = self._w * keep + 1.0
        self._x = self._x * keep + x
        self._y = self._y * keep + seconds
        self._xx = self._xx * keep + x * x
        self._xy = self._xy * keep + x * seconds

    @property
    def seen(self) -> bool:
        return self._w > 0

    def at(self, x: float) -> float:
        """Seconds at `x`, never below a tenth of the mean that was measured."""
        if not self.seen:
            return self.prior_a + self.prior_b * x
        mean_x, mean_y = self._x / self._w, self._y / self._w
        spread = self._xx / self._w - mean_x * mean_x
        slope = self.prior_b
        if spread > 1e-6:
            fitted = (self._xy / self._w - mean_x * mean_y) / spread
            trust = self._w * spread / (self._w * spread + 10.0)
            slope = max(0.0, trust * fitted + (1 - trust) * self.prior_b)
        return max(mean_y + slope * (x - mean_x), mean_y * 0.1)


class MeasuredCosts:
    """`Costs` from the running worker.

    Verification is everything of a round that is not drafting, the engine's own share included: time between the
    starts of two rounds, less the draft stage. A drafter that was never timed is free, so that it is tried.

    Args:
        width: arm → rows that a request routed to it usually verifies.
    """

    def __init__(self, width: Callable[[str], int]) -> None:
        self._width = width
        self._verify = Line(prior_a=0.020, prior_b=0.0006)
        self._draft: dict[str, Line] = {}

    def drafted(self, arm: str, requests: int, seconds: float) -> None:
        """A draft pass with its catch-up took `seconds`."""
        self._draft.setdefault(arm, Line(0.0, 0.0002)).add(requests, seconds)

    def verified(self, rows: int, seconds: float) -> None:
        """The rest of a round that verified `rows` rows took `seconds`."""
        self._verify.add(rows, seconds)

    def draft(self, arm: str, requests: int) -> float:
        line = self._draft.get(arm)
        return line.at(requests) if line else 0.0

    def verify(self, rows: int, requests: int) -> float:
        return self._verify.at(rows)

    def width(self, arm: str) -> int:
        return self._width(arm)

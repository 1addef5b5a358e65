"""Latencies that the worker measures itself: a line per stage, refitted with every round."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from whiflash_sglang.routing.mean import Mean

MEMORY = 200.0
"""Rounds after which an old measurement counts for little; machines get slower and faster while they serve."""

RATE_MEMORY = 32.0
"""Rounds that the server's present rate is taken from: it changes with every request that comes or goes."""

PRIOR_SLOPE = 0.03
"""What one more row adds to a verification, as a share of it, before rows of different number were seen."""


class Worth(NamedTuple):
    """Expected accepted tokens that a further draft token must bring to pay for itself, at the server's present rate.

    row: to verify one more row of one request. draft: to run the drafter once more, for the whole batch.
    """

    row: float
    draft: float


FULL_LENGTH = Worth(0.0, 0.0)
"""Every draft is worth it: drafts are as long as they may be."""


@dataclass(slots=True)
class Line:
    """seconds ≈ a + b·x by decayed least squares, pulled towards a prior while there is little data.

    The slope is never negative: more work is not faster, only noise says so. prior_slope: instead of `prior_b`, a
    share of the measured mean, once there is one.
    """

    prior_a: float
    prior_b: float
    prior_slope: float | None = None
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

    @property
    def slope(self) -> float:
        """Seconds that one more of x costs."""
        if not self.seen:
            return self.prior_b
        mean_x, mean_y = self._x / self._w, self._y / self._w
        prior = self.prior_b if self.prior_slope is None else self.prior_slope * mean_y
        spread = self._xx / self._w - mean_x * mean_x
        if spread <= 1e-6:
            return prior
        fitted = (self._xy / self._w - mean_x * mean_y) / spread
        trust = self._w * spread / (self._w * spread + 10.0)
        return max(0.0, trust * fitted + (1 - trust) * prior)

    def at(self, x: float) -> float:
        """Seconds at `x`, never below a tenth of the mean that was measured."""
        if not self.seen:
            return self.prior_a + self.prior_b * x
        mean_x, mean_y = self._x / self._w, self._y / self._w
        return max(mean_y + self.slope * (x - mean_x), mean_y * 0.1)


class MeasuredCosts:
    """`Costs` from the running worker.

    Verification is everything of a round that is not drafting, the engine's own share included: time between the
    starts of two rounds, less the draft stage. A drafter that was never timed is free, so that it is tried.

    Args:
        width: arm → most rows that a request routed to it verifies; the measured mean takes its place.
    """

    def __init__(self, width: Callable[[str], int]) -> None:
        self._widest = width
        self._verify = Line(prior_a=0.020, prior_b=0.0006, prior_slope=PRIOR_SLOPE)
        self._draft: dict[str, Line] = {}
        self._pass: dict[str, Mean] = {}
        self._rows: dict[str, Mean] = {}
        self._tokens, self._seconds = Mean(), Mean()

    def drafted(self, arm: str, requests: int, *, passes: int, seconds: float, catch_up: float) -> None:
        """`arm` drafted for `requests` requests in `passes` passes of its model, after catching up."""
        self._draft.setdefault(arm, Line(0.0, 0.0002)).add(requests, seconds + catch_up)
        self._pass.setdefault(arm, Mean()).add(seconds / max(passes, 1), MEMORY)

    def widened(self, arm: str, rows: int) -> None:
        """A request routed to `arm` verified `rows` rows."""
        self._rows.setdefault(arm, Mean()).add(rows, MEMORY)

    def verified(self, rows: int, seconds: float) -> None:
        """The rest of a round that verified `rows` rows took `seconds`."""
        self._verify.add(rows, seconds)

    def committed(self, tokens: int, seconds: float) -> None:
        """A whole round took `seconds` and committed `tokens`."""
        self._tokens.add(tokens, RATE_MEMORY)
        self._seconds.add(seconds, RATE_MEMORY)

    def worth(self, arm: str) -> Worth:
        """What a further draft token of `arm` must bring. Full length until a rate was measured."""
        if self._seconds.total <= 0:
            return FULL_LENGTH
        rate = self._tokens.total / self._seconds.total
        one_pass = self._pass.get(arm)
        return Worth(rate * self._verify.slope, rate * one_pass.value if one_pass else 0.0)

    def draft(self, arm: str, requests: int) -> float:
        line = self._draft.get(arm)
        return line.at(requests) if line else 0.0

    def verify(self, rows: float, requests: int) -> float:
        return self._verify.at(rows)

    def width(self, arm: str) -> float:
        rows = self._rows.get(arm)
        return rows.value if rows else self._widest(arm)

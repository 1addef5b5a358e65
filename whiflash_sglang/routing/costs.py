"""Latencies that the worker measures itself: a line for drafting, a plane for verification, refitted every round.

What they learn from is what rounds took, whoever's they were: a pinned request's rounds tell as much of a machine as
any other's. One slow moment counts for little, whichever stage it fell in; a machine that is slower for most of a few
rounds is believed at once (`watch`).
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from whiflash_sglang.routing.mean import Mean
from whiflash_sglang.routing.watch import CHEAPER, LIMIT, WINDOW, Watch, median, within

MEMORY = 200.0
"""Rounds after which an old measurement counts for little; machines get slower and faster while they serve."""

DRAFTS_MEMORY = 32.0
"""Requests' rounds after which a number of drafts counts for little: text that is copied begins and ends."""

RATE_ROUNDS = 32
"""Rounds that the server's present rate is taken from: it changes with every request that comes or goes."""

PLAIN_ROUNDS = 8
"""Rounds without drafts that were timed before anybody is told what plain decoding would cost."""

STIFFNESS = 10.0
"""How much data a prior slope counts for: rounds times the spread of what they differ in."""

FIRST_ROUND = 0.020
"""Seconds of a verification before the first one was timed."""

FIRST_DRAFT = 0.0002
"""Seconds that one more request adds to a draft pass, before their number differed."""

SHORTEST = 1e-6
"""Seconds; a clock may not have moved."""

PRIOR_SHARE = 0.03
"""What one more draft, or one more request, adds to a verification, as a share of it, before their number differed."""


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
    """seconds ≈ a + b·x by decayed least squares; b is pulled towards `prior_b` while there is little data.

    The slope is never negative: more work is not faster, only noise says so. Something must have been added.
    """

    prior_b: float
    _w: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0
    _watch: Watch = field(default_factory=Watch)

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
        self._watch = Watch()

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


class MeasuredCosts:
    """`Costs` from the running worker.

    Verification is everything of a round that is not drafting, and what the engine takes between two rounds on
    average: rounds without drafts share a step of its scheduler, so by the round it would be charged to drafts. A
    drafter that was never timed is free, so that it is tried; one that only looks is never timed: it looks in every
    round, and says how many rows it would add.

    Args:
        width: arm → most rows that a request routed to it verifies, of its own drafts; a measured mean replaces it.
    """

    def __init__(self, width: Callable[[str], int]) -> None:
        self._widest = width
        self._verify = Plane(FIRST_ROUND, PRIOR_SHARE)
        self._draft: dict[str, Line] = {}
        self._timings: dict[str, int] = {}
        self._passes: dict[str, deque[float]] = {}
        self._rows: dict[str, Mean] = {}
        self._drafts: dict[str, Mean] = {}
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=RATE_ROUNDS)
        self._rate = self._gap = 0.0
        self._plain_rounds = 0

    def drafted(self, arm: str, requests: int, *, passes: int, seconds: float, catch_up: float) -> None:
        """`arm` drafted for `requests` requests in `passes` passes of its model, at least one, after catching up."""
        seconds = max(seconds, SHORTEST)
        before = self.draft(arm, requests)
        wrong = self._draft.setdefault(arm, Line(FIRST_DRAFT)).add(requests, seconds + catch_up)
        # What costs less than one more row decides nothing.
        matters = max(before, self.draft(arm, requests)) > PRIOR_SHARE * self._verify.at(0, requests)
        self._timings[arm] = 0 if wrong and matters else self.timings(arm) + 1
        self._passes.setdefault(arm, deque(maxlen=WINDOW)).append(seconds / passes)

    def timings(self, arm: str) -> int:
        """How often a draft of `arm` was timed since its price was last found wrong, or ever."""
        return self._timings.get(arm, 0)

    def widened(self, arm: str, rows: int) -> None:
        """A request routed to `arm` verified `rows` rows."""
        self._rows.setdefault(arm, Mean()).add(rows, MEMORY)

    def wanted(self, route: str, drafts: int) -> None:
        """A request routed to `route` had `drafts` drafts, its own or another arm's, before some were left out."""
        self._drafts.setdefault(route, Mean()).add(drafts, DRAFTS_MEMORY)

    def verified(self, rows: int, requests: int, seconds: float) -> None:
        """The rest of a round that verified `rows` rows of `requests` requests took `seconds`."""
        self._plain_rounds += rows == requests
        self._verify.add(rows - requests, requests, max(seconds, SHORTEST))

    def committed(self, tokens: int, seconds: float, gap: float = 0.0) -> None:
        """A whole round took `seconds` and committed `tokens`; the engine took `gap` seconds until the next."""
        self._recent.append((tokens, seconds, gap))
        longest = LIMIT * median([round_seconds for _, round_seconds, _ in self._recent])
        gaps = sum(min(pause, longest) for *_, pause in self._recent)
        spent = gaps + sum(min(round_seconds, longest) for _, round_seconds, _ in self._recent)
        self._rate = sum(count for count, *_ in self._recent) / max(spent, SHORTEST)
        self._gap = gaps / len(self._recent)

    @property
    def knows_plain(self) -> bool:
        """Whether rounds without drafts were timed: before, what they cost rests on guesses about drafts."""
        return self._plain_rounds >= PLAIN_ROUNDS

    def worth(self, arm: str) -> Worth:
        """What a further draft token of `arm` must bring. Full length until a rate was measured."""
        if not self._rate:
            return FULL_LENGTH
        passes = self._passes.get(arm)
        return Worth(self._rate * self._verify.slopes[0], self._rate * median(passes) if passes else 0.0)

    def fitted(self, arms: Iterable[str]) -> dict[tuple[str, str], float]:
        """Seconds by kind of work, and by arm where it is an arm's (`telemetry.series` says what each means).

        0 of what was not timed yet.
        """
        draft, request = self._verify.slopes
        found = {
            ("verify", ""): self._verify.at(0, 1),
            ("verify_draft", ""): draft,
            ("verify_request", ""): request,
            ("between", ""): self._gap,
        }
        for arm in arms:
            line = self._draft.get(arm)
            found["draft", arm] = self.draft(arm, 1)
            found["draft_request", arm] = line.slope if line else 0.0
        return found

    def snapshot(self, arms: Iterable[str]) -> dict[str, Any]:
        """`fitted` as `GET /whiflash/state` has it: by kind of work, and below that by arm where it is an arm's."""
        found: dict[str, Any] = {}
        for (work, arm), seconds in self.fitted(arms).items():
            if arm:
                found.setdefault(work, {})[arm] = seconds
            else:
                found[work] = seconds
        return found

    def draft(self, arm: str, requests: int) -> float:
        line = self._draft.get(arm)
        return line.at(requests) if line else 0.0

    def verify(self, rows: float, requests: int) -> float:
        return self._verify.at(rows - requests, requests) + self._gap

    def drafts(self, route: str) -> float:
        """Drafts that a request routed to `route` has: room for fewer than there are would never show that."""
        drafts = self._drafts.get(route)
        return drafts.value if drafts else self._widest(route) - 1

    def width(self, arm: str) -> float:
        rows = self._rows.get(arm)
        return rows.value if rows else self._widest(arm)

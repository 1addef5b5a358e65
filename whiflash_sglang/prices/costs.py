"""Prices of a round's work in seconds, for `assign`, for cutting drafts that do not pay, and for metrics.

`Costs` is what every server learns from its rounds. On a CPU the price of drafting is a line and that of verification a
plane, refitted every round (`MeasuredCosts`). On a GPU, which works asynchronously, prices are looked up
(`tables.LookedUpCosts`). Both learn from the times of all rounds, also of pinned requests. A single slow round counts
for little; if most of the last few rounds are slower, prices follow at once (`fits.DriftDetector`).
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from whiflash_sglang.drafts.rates import RECENT_ROUNDS, Mean
from whiflash_sglang.prices.fits import LIMIT, MEMORY, STIFFNESS, WINDOW, Fit, median
from whiflash_sglang.prices.round_clock import RoundTime

PROBE_ROUNDS = 256
"""Rounds of the batch between two probes of an arm whose acceptance and price are well known."""

UNKNOWN = Mean()
"""Mean number of drafts of a request that had no round yet."""

DRAFTS_MEMORY = 32.0
"""Rounds after which an old number of drafts counts for little. It is short because copied passages begin and end."""

RATE_ROUNDS = 32
"""Rounds that the server's rate in tokens per second is taken from. It changes whenever a request comes or goes."""

PLAIN_ROUNDS = 8
"""Rounds that must be timed before the price of plain decoding, and so the gain of drafting, is known."""

FIRST_ROUND = 0.020
"""Seconds assumed for a verification before the first one was timed."""

FIRST_DRAFT = 0.0002
"""Seconds that one more request is assumed to add to a draft pass, until passes of several sizes were timed."""

SHORTEST = 1e-6
"""Smallest duration in seconds, because a clock may not have moved between two readings."""

PRIOR_SHARE = 0.03
"""Assumed price of one more draft or request, as a share of a verification, until several sizes were timed."""

LEAST_STEP = 0.25
"""Smallest step in price from one row to several that is believed, as a share of a verification's mean."""

LEAST_CHANCE = 0.1
"""Chance of acceptance below which a draft is not verified if rows have no price."""


class Worth(NamedTuple):
    """Expected accepted tokens that a further draft must bring to pay for itself, at the server's present rate.

    row: to pay for one more verified row of a request. draft: to pay for one more drafter pass, for the whole batch.
    """

    row: float
    draft: float

    @property
    def least_chance(self) -> float:
        """Chance of acceptance below which a draft is not worth its row; `LEAST_CHANCE` if rows have no price."""
        return self.row or LEAST_CHANCE


FULL_LENGTH = Worth(0.0, 0.0)
"""Worth without known prices: drafts have full length, down to a chance of `LEAST_CHANCE`."""


class Costs(ABC):
    """Base class of prices in seconds. It learns how many drafts rounds have and the server's tokens per second.

    Args:
        width: arm → most rows that a request routed to it verifies, of its own drafts; used until a mean is measured.
    """

    priced_by = "plain rounds"
    """Kind of rounds, for people, whose times show the price of plain decoding."""

    def __init__(self, width: Callable[[str], int]) -> None:
        self._pricing_rounds = 0
        self._widest = width
        self._rows: defaultdict[str, Mean] = defaultdict(Mean)
        self._drafts: defaultdict[str, tuple[Mean, Mean]] = defaultdict(lambda: (Mean(), Mean()))
        """By route, the mean number of drafts and the mean squared deviation from the request's usual number."""
        self._context = self._requests = 0
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=RATE_ROUNDS)
        self._rate = self._gap = 0.0
        self._limits: Mapping[str, int] = {}

    @abstractmethod
    def draft(self, arm: str, requests: int, drafts: int = 0) -> float:
        """Return the seconds of a pass of `arm` for `requests` requests, catch-up included.

        drafts: length of the pass, one of `lengths`; 0: the present limit (`limit`).
        """

    @abstractmethod
    def verify(self, rows: float, requests: int) -> float:
        """Return the seconds of one target forward over `rows` packed rows, with the round's fixed cost."""

    def lasts(self, work: float) -> float:
        """Return the seconds of a round whose drafting and verification take `work` seconds."""
        return work

    @abstractmethod
    def timings(self, arm: str) -> int:
        """Return how often a draft of `arm` was timed since its price was last found wrong."""

    def plain(self, requests: int) -> float | None:
        """Return the seconds of a round of so many requests without drafts, or None while that would be a guess.

        Every gain that is shown or counted is relative to this price.
        """
        known = self._pricing_rounds >= PLAIN_ROUNDS
        return self.lasts(self.verify(requests, requests)) if known else None

    def plain_price(self) -> dict[str, Any]:
        """Return how far the price of plain decoding is known, for people: `rounds` of `needed` ones, and which."""
        return {
            "rounds": min(self._pricing_rounds, PLAIN_ROUNDS),
            "needed": PLAIN_ROUNDS,
            "of": self.priced_by,
        }

    @abstractmethod
    def worth(self, arm: str) -> Worth:
        """Return the tokens that a further draft of `arm` must bring; `FULL_LENGTH` until a rate was measured."""

    @abstractmethod
    def fitted(self, arms: Iterable[str]) -> dict[tuple[str, str], float]:
        """Return prices in seconds by (kind of work, arm), the arm "" if it has none (`metrics.SERIES` describes each).

        Prices that were not timed yet are 0.
        """

    def observe(self, previous: RoundTime) -> None:
        """Learn from the times of a round and of the gap after it. Rounds teach prices in no other way."""
        self._recent.append((previous.tokens, previous.seconds, previous.gap))
        tokens, seconds, gaps = zip(*self._recent, strict=True)
        longest = LIMIT * median(seconds)
        paused, worked = (sum(map(min, each, repeat(longest))) for each in (gaps, seconds))
        self._rate = sum(tokens) / max(paused + worked, SHORTEST)
        self._gap = paused / len(self._recent)

    def set_contexts(self, contexts: Sequence[int]) -> None:
        """Set the context lengths, at most, of the requests of the round that is planned next."""
        self._context, self._requests = sum(contexts), len(contexts)

    def widened(self, arm: str, rows: int) -> None:
        """Learn that a request routed to `arm` verified `rows` rows."""
        self._rows[arm].add(rows, MEMORY)

    def wanted(self, route: str, drafts: int, own: Mean) -> None:
        """Learn that a request routed to `route` had `drafts` drafts, of any arm, before some were left out.

        own: the request's mean over its rounds with this route, which is updated.
        """
        mean, squares = self._drafts[route]
        usual = own.shrunk(mean.value, 1.0) if mean.weight else drafts
        squares.add((drafts - usual) ** 2, DRAFTS_MEMORY)
        mean.add(drafts, DRAFTS_MEMORY)
        own.add(drafts, RECENT_ROUNDS)

    def room(self, route: str, own: Mean = UNKNOWN) -> float:
        """Return how many drafts of a request a round has rows for: the request's mean, shrunk towards the route's by
        one round, plus a deviation divided by the square root of the batch size.

        Blocks that are always full need no more, and in a batch deviations average out: few drafts are left out, few
        rows are padding. Drafts are counted before some are left out, else too little room would never be noticed.
        """
        if (known := self._drafts.get(route)) is None:
            return self._widest(route) - 1
        mean, squares = known
        return own.shrunk(mean.value, 1.0) + math.sqrt(squares.value / max(self._requests, 1))

    def packed(self, requests: int, drafts: int) -> int:
        """Return the drafts that a round of so many requests verifies if they have `drafts` in all."""
        return drafts

    def lengths(self, arm: str) -> tuple[int, ...]:
        """Return the lengths that a pass of `arm` may be limited to before it runs, ascending; the last is no limit."""
        return (self._widest(arm) - 1,)

    def limit(self, lengths: Mapping[str, int]) -> None:
        """Set by arm the number of drafts to which the round that is planned next limits its passes."""
        self._limits = lengths

    def length(self, arm: str) -> int:
        """Return the most drafts that a pass of `arm` makes in the round that is planned."""
        return self._limits.get(arm, 0) or self.lengths(arm)[-1]

    def width(self, arm: str) -> float:
        """Return the mean number of rows (drafts + 1) that a request routed to `arm` verifies."""
        rows = self._rows.get(arm)
        return rows.value if rows else self._widest(arm)

    def snapshot(self, arms: Iterable[str]) -> dict[str, Any]:
        """Return the prices of `fitted` as in `GET /whiflash/state`: by kind of work, then by arm if it has one."""
        prices: dict[str, Any] = {}
        for (work, arm), seconds in self.fitted(arms).items():
            if arm:
                prices.setdefault(work, {})[arm] = seconds
            else:
                prices[work] = seconds
        return prices


def verification() -> Fit:
    """Return a new fit of a verification's seconds by drafts, requests and the step from one row (`work_of`).

    Drafts and requests have slopes of their own, because a busy server has more of both and a draft would be charged
    for the requests. One row uses another matrix product than several: in float32 on two cores the second row made
    rounds 1.6 times as long, and eight more did not. A step below `LEAST_STEP` counts as none: the slope of drafts can
    explain it, and packed bfloat16 weights have no step. The step's spread is at most a quarter, so its prior has less
    stiffness.
    """
    return Fit(
        lambda mean: (mean * PRIOR_SHARE, mean * PRIOR_SHARE, 0.0),
        stiffness=(STIFFNESS, STIFFNESS, 1.0),
        least=(0.0, 0.0, LEAST_STEP),
        first=FIRST_ROUND,
        at=work_of(1, 1),
    )


def work_of(rows: float, requests: int) -> tuple[float, ...]:
    """Return a verification's counts for the fit: drafts, requests, and 1 if a single request has drafts, else 0."""
    return rows - requests, requests, rows > requests == 1


class MeasuredCosts(Costs):
    """Costs on a CPU: fitted to the rounds of the running worker, on the host's clock.

    Verification is all of a round except drafting, plus the mean gap between two rounds. The mean is used because
    rounds without drafts share a scheduler step, so each round's own gap would be charged to drafts. A drafter that was
    never timed has price 0, so that it is tried. A text drafter has no price: it looks in every round.
    """

    def __init__(self, width: Callable[[str], int]) -> None:
        super().__init__(width)
        self._verify = verification()
        self._draft = defaultdict[str, Fit](lambda: Fit(lambda _: (FIRST_DRAFT,)))
        self._timings: dict[str, int] = {}
        self._passes = defaultdict[str, deque[float]](lambda: deque(maxlen=WINDOW))

    def drafted(self, arm: str, requests: int, passes: int, seconds: float, catch_up: float = 0.0) -> None:
        """Learn the seconds of an arm's draft in a round (`RoundTime.drafts`) or at the start, where arms are timed."""
        seconds = max(seconds, SHORTEST)
        before = self.draft(arm, requests)
        wrong = self._draft[arm].add((requests,), seconds + catch_up)
        # A wrong price matters only above that of one more row: cheaper drafts change no route.
        matters = max(before, self.draft(arm, requests)) > PRIOR_SHARE * self._verify.at(
            work_of(requests, requests)
        )
        self._timings[arm] = 0 if wrong and matters else self.timings(arm) + 1
        self._passes[arm].append(seconds / passes)

    def timings(self, arm: str) -> int:
        return self._timings.get(arm, 0)

    def observe(self, previous: RoundTime) -> None:
        for draft in previous.drafts:
            self.drafted(*draft)
        self._pricing_rounds += previous.rows == previous.requests
        self._verify.add(work_of(previous.rows, previous.requests), previous.rest)
        super().observe(previous)

    def worth(self, arm: str) -> Worth:
        if not self._rate:
            return FULL_LENGTH
        passes = self._passes.get(arm)
        return Worth(self._rate * self._verify.slopes[0], self._rate * median(passes) if passes else 0.0)

    def fitted(self, arms: Iterable[str]) -> dict[tuple[str, str], float]:
        draft, request, step = self._verify.slopes
        prices = {
            ("verify", ""): self._verify.at(work_of(1, 1)),
            ("verify_draft", ""): draft,
            ("verify_request", ""): request,
            ("verify_several", ""): step,
            ("between", ""): self._gap,
        }
        for arm in arms:
            prices["draft", arm] = self.draft(arm, 1)
            prices["draft_request", arm] = self._draft[arm].slopes[0] if arm in self._draft else 0.0
        return prices

    def draft(self, arm: str, requests: int, drafts: int = 0) -> float:
        return self._draft[arm].at((requests,)) if arm in self._draft else 0.0

    def verify(self, rows: float, requests: int) -> float:
        return self._verify.at(work_of(rows, requests)) + self._gap

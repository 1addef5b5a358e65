"""Prices of a round's work in seconds: what `assign` compares, what ends drafts that do not pay, what metrics show.

`Costs` is what every server learns of its rounds. On a CPU drafting is a line and verification a plane, refitted every
round (`MeasuredCosts`); on a device that works behind the host prices are looked up (`tables.LookedUpCosts`). Both
learn from the times of all rounds, pinned requests' too. One slow moment counts for little, whichever stage it fell in;
a machine that is slower for most of a few rounds is believed at once (`fits.DriftDetector`).
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
"""Rounds of the batch between two probes of an arm that is well known."""

UNKNOWN = Mean()
"""A request that had no round yet."""

DRAFTS_MEMORY = 32.0
"""Requests' rounds after which a number of drafts counts for little: text that is copied begins and ends."""

RATE_ROUNDS = 32
"""Rounds that the server's present rate is taken from: it changes with every request that comes or goes."""

PLAIN_ROUNDS = 8
"""Rounds that are timed before the price of plain decoding is known, and with it what drafting brings."""

FIRST_ROUND = 0.020
"""Seconds of a verification before the first one was timed."""

FIRST_DRAFT = 0.0002
"""Seconds that one more request adds to a draft pass, before their number differed."""

SHORTEST = 1e-6
"""Seconds; a clock may not have moved."""

PRIOR_SHARE = 0.03
"""The price of one more draft or request in a verification, as a share of it, before their number differed."""

LEAST_STEP = 0.25
"""A share of a verification's mean: a step from one row to several that is smaller is none."""

LEAST_CHANCE = 0.1
"""Chance of being accepted below which a draft is not worth its row, where rows are not priced."""


class Worth(NamedTuple):
    """Expected accepted tokens that a further draft token must bring to pay for itself, at the server's present rate.

    row: to verify one more row of one request. draft: to run the drafter once more, for the whole batch.
    """

    row: float
    draft: float

    @property
    def least_chance(self) -> float:
        """Chance of being accepted below which a draft that costs its row alone is not worth it."""
        return self.row or LEAST_CHANCE


FULL_LENGTH = Worth(0.0, 0.0)
"""No price is known: drafts are as long as they may be, down to a chance of `LEAST_CHANCE`."""


class Costs(ABC):
    """Prices in seconds, and what every way to price learns of rounds: how wide they are, and the server's rate.

    Args:
        width: arm → most rows that a request routed to it verifies, of its own drafts; a measured mean replaces it.
    """

    priced_by = "plain rounds"
    """Name of the rounds whose times show the price of plain decoding."""

    def __init__(self, width: Callable[[str], int]) -> None:
        self._pricing_rounds = 0
        self._widest = width
        self._rows: defaultdict[str, Mean] = defaultdict(Mean)
        self._drafts: defaultdict[str, tuple[Mean, Mean]] = defaultdict(lambda: (Mean(), Mean()))
        """Per route, drafts that there were, and the squares of how many more or fewer than usual."""
        self._context = self._requests = 0
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=RATE_ROUNDS)
        self._rate = self._gap = 0.0
        self._limits: Mapping[str, int] = {}

    @abstractmethod
    def draft(self, arm: str, requests: int, drafts: int = 0) -> float:
        """Seconds of a pass of `arm`, catch-up included, for `requests` requests.

        drafts: its length, one of `lengths`; 0: as long as its passes are now.
        """

    @abstractmethod
    def verify(self, rows: float, requests: int) -> float:
        """One target forward over `rows` packed rows, and the round's fixed cost."""

    def lasts(self, work: float) -> float:
        """Seconds of a round with so much work."""
        return work

    @abstractmethod
    def timings(self, arm: str) -> int:
        """How often a draft of `arm` was timed since its price was last found wrong."""

    def plain(self, requests: int) -> float | None:
        """Return the seconds of a round of so many requests without drafts, or None while that would be a guess.

        Every gain that is shown or counted starts here: what a round saved is known only if this price is.
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
        """The value that a further draft token of `arm` must have. Full length until a rate was measured."""

    @abstractmethod
    def fitted(self, arms: Iterable[str]) -> dict[tuple[str, str], float]:
        """Seconds by kind of work, and by arm where it is an arm's (`metrics.SERIES` says what each means).

        0 of what was not timed yet.
        """

    def observe(self, previous: RoundTime) -> None:
        """A round and the pause after it were timed: the only way in which rounds teach what work takes."""
        self._recent.append((previous.tokens, previous.seconds, previous.gap))
        tokens, seconds, gaps = zip(*self._recent, strict=True)
        longest = LIMIT * median(seconds)
        paused, worked = (sum(map(min, each, repeat(longest))) for each in (gaps, seconds))
        self._rate = sum(tokens) / max(paused + worked, SHORTEST)
        self._gap = paused / len(self._recent)

    def set_contexts(self, contexts: Sequence[int]) -> None:
        """The round that is planned next is for requests that have so many tokens, at most."""
        self._context, self._requests = sum(contexts), len(contexts)

    def widened(self, arm: str, rows: int) -> None:
        """A request routed to `arm` verified `rows` rows."""
        self._rows[arm].add(rows, MEMORY)

    def wanted(self, route: str, drafts: int, own: Mean) -> None:
        """A request routed to `route` had `drafts` drafts, its own or another arm's, before some were left out.

        own: of its rounds with this route.
        """
        mean, squares = self._drafts[route]
        usual = own.shrunk(mean.value, 1.0) if mean.weight else drafts
        squares.add((drafts - usual) ** 2, DRAFTS_MEMORY)
        mean.add(drafts, DRAFTS_MEMORY)
        own.add(drafts, RECENT_ROUNDS)

    def room(self, route: str, own: Mean = UNKNOWN) -> float:
        """Drafts that a round makes room for, of a request routed to `route`: its mean, of which one round more is
        everybody's, and one deviation of a batch's.

        Blocks that are always full need no more, and requests that differ even out: few drafts are left out, few rows
        are padding. Room for fewer than there are would never show that, so drafts count before some are left out.
        """
        if (known := self._drafts.get(route)) is None:
            return self._widest(route) - 1
        mean, squares = known
        return own.shrunk(mean.value, 1.0) + math.sqrt(squares.value / max(self._requests, 1))

    def packed(self, requests: int, drafts: int) -> int:
        """Drafts that a round of so many requests verifies, if its requests have `drafts`."""
        return drafts

    def lengths(self, arm: str) -> tuple[int, ...]:
        """Numbers of drafts that a pass of `arm` may be limited to before it runs, ascending, its own the last one."""
        return (self._widest(arm) - 1,)

    def limit(self, lengths: Mapping[str, int]) -> None:
        """The round that is planned next limits the passes of these arms to so many drafts."""
        self._limits = lengths

    def length(self, arm: str) -> int:
        """Drafts that a pass of `arm` in the round that is planned makes at most."""
        return self._limits.get(arm, 0) or self.lengths(arm)[-1]

    def width(self, arm: str) -> float:
        """Rows that a request routed to `arm` usually adds to verification (drafts + 1)."""
        rows = self._rows.get(arm)
        return rows.value if rows else self._widest(arm)

    def snapshot(self, arms: Iterable[str]) -> dict[str, Any]:
        """`fitted` as `GET /whiflash/state` has it: by kind of work, and below that by arm where it is an arm's."""
        prices: dict[str, Any] = {}
        for (work, arm), seconds in self.fitted(arms).items():
            if arm:
                prices.setdefault(work, {})[arm] = seconds
            else:
                prices[work] = seconds
        return prices


def verification() -> Fit:
    """Seconds by `work_of` a verification.

    A busy server verifies more drafts *and* serves more requests: on one line a draft would be charged for both. One
    row is another product than several: in float32 on two cores a second row made rounds 1.6 times as long, and eight
    more did not. A step below `LEAST_STEP` is none: drafts' slopes say as much, and packed bfloat16 weights have none.
    The step's spread is a quarter at most, so its prior counts for less.
    """
    return Fit(
        lambda mean: (mean * PRIOR_SHARE, mean * PRIOR_SHARE, 0.0),
        stiffness=(STIFFNESS, STIFFNESS, 1.0),
        least=(0.0, 0.0, LEAST_STEP),
        first=FIRST_ROUND,
        at=work_of(1, 1),
    )


def work_of(rows: float, requests: int) -> tuple[float, ...]:
    """Drafts, requests, and 1 where a single request has drafts."""
    return rows - requests, requests, rows > requests == 1


class MeasuredCosts(Costs):
    """Costs measured in the running worker, on the host's clock.

    Verification is everything of a round that is not drafting, and what the engine takes between two rounds on
    average: rounds without drafts share a step of its scheduler, so by the round it would be charged to drafts. A
    drafter that was never timed is free, so that it is tried; one that only looks is never timed: it looks in every
    round, and says how many rows it would add.
    """

    def __init__(self, width: Callable[[str], int]) -> None:
        super().__init__(width)
        self._verify = verification()
        self._draft = defaultdict[str, Fit](lambda: Fit(lambda _: (FIRST_DRAFT,)))
        self._timings: dict[str, int] = {}
        self._passes = defaultdict[str, deque[float]](lambda: deque(maxlen=WINDOW))

    def drafted(self, arm: str, requests: int, passes: int, seconds: float, catch_up: float = 0.0) -> None:
        """An arm drafted (`RoundTime.drafts`): in a round, or at the start, when every arm is profiled."""
        seconds = max(seconds, SHORTEST)
        before = self.draft(arm, requests)
        wrong = self._draft[arm].add((requests,), seconds + catch_up)
        # A price below that of one more row decides nothing.
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

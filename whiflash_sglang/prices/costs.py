"""Prices of a round's work in seconds, for `assign`, for cutting drafts that do not pay, and for metrics.

The work is timed at the server's start, in tables (:mod:`.tables`). While a device works, the host's clock only shows
how long launching took, so no price is fitted to it. Rounds show what the tables cannot know (lower clocks, other
processes, the host's share): one factor for all prices, the seconds of rounds over their price. It moves slowly, and at
once if most of the last rounds agree that it is wrong (:mod:`.correction`). All rounds teach it, also those of pinned
requests. Whole rounds are timed by device events, on a CPU by the host's clock.
"""

import math
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import repeat
from typing import Any, NamedTuple

from whiflash_sglang.drafts.rates import RECENT_ROUNDS, Mean
from whiflash_sglang.prices.correction import LIMIT, MEMORY, Correction, median
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.prices.tables import SHORTEST, CostTables

PROBE_ROUNDS = 256
"""Rounds of the batch between two probes of an arm whose acceptance is well known."""

UNKNOWN = Mean()
"""Mean number of drafts of a request that had no round yet."""

DRAFTS_MEMORY = 32.0
"""Rounds after which an old number of drafts counts for little. It is short because copied passages begin and end."""

RATE_ROUNDS = 32
"""Rounds that the server's rate in tokens per second is taken from. It changes whenever a request comes or goes."""

PLAIN_ROUNDS = 8
"""Rounds that must be timed before the price of plain decoding, and so the gain of drafting, is known."""

LEAST_CHANCE = 0.1
"""Chance of acceptance below which a draft is not verified if rows have no price."""

LEFT_OUT = 2.0
"""Least assumed worth of a draft that finds no room in a smaller graph, as a multiple of a row's price."""

FILLED = 0.5
"""Assumed worth of a draft that fills a row of a larger graph, as a multiple of a row's price: it was not worth one."""

LARGER = 5
"""Number of graphs, from the smallest one that holds all drafts on, that a round may use."""

WAITED = 0.05
"""A gap longer than this share of a round's seconds means that the device waited for the host. Launches leave small
gaps, too."""

FORGOTTEN = 0.998
"""Decay of the host's seconds per round in rounds in which the device did not wait: they may have become shorter."""


class Worth(NamedTuple):
    """Expected accepted tokens that a further draft must bring to pay for its row, at the server's present rate."""

    row: float

    @property
    def least_chance(self) -> float:
        """Chance of acceptance below which a draft is not worth its row; `LEAST_CHANCE` if rows have no price."""
        return self.row or LEAST_CHANCE


FULL_LENGTH = Worth(0.0)
"""Worth without known prices: drafts have full length, down to a chance of `LEAST_CHANCE`."""


class Costs:
    """Prices in seconds, looked up in `tables`, which must be set before anything is priced.

    A round pads its verification to the drafts that it has room for, so that number of rows is looked up.

    Args:
        width: arm → most rows of its own that a request routed to it verifies; used until a mean is measured.
        overlaps: whether the host works while the device does; otherwise its seconds are added.
    """

    tables: CostTables

    def __init__(self, width: Callable[[str], int], overlaps: bool = True) -> None:
        self._widest, self._overlaps = cache(width), overlaps
        self.correction = Correction()
        self._rounds = self._verified = 0
        self._drafts: defaultdict[str, tuple[Mean, Mean]] = defaultdict(lambda: (Mean(), Mean()))
        """By route, the mean number of drafts and the mean squared deviation from the request's usual number."""
        self._context = self._requests = 0
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=RATE_ROUNDS)
        self._rate = self._gap = self._host = 0.0
        """Tokens per second; seconds between two rounds; seconds of a round in which the device waits for the host."""
        self._busy = Mean(1.0, 1.0)
        """Share of rounds in which the device did not wait for the host: only these take longer with more work."""
        self._brought = 0.0
        """Worth of a verified draft in uncorrected seconds: its mean accepted tokens over the server's tokens/s."""
        self._behind: dict[str, Mean] = {}
        """By arm, the mean number of tokens that a request's catch-up ingests before a pass."""
        self._limits: Mapping[str, int] = {}

    def observe(self, previous: RoundTime) -> None:
        """Learn from the times of a round and of the gap after it. Rounds teach prices in no other way."""
        self._recent.append((previous.tokens, previous.seconds, previous.gap))
        tokens, seconds, gaps = zip(*self._recent, strict=True)
        longest = LIMIT * median(seconds)
        paused, worked = (
            sum(each if max(each) <= longest else map(min, each, repeat(longest))) for each in (gaps, seconds)
        )
        self._rate = sum(tokens) / max(paused + worked, SHORTEST)
        self._gap = paused / len(self._recent)
        self._verified = previous.rows
        for arm, requests in previous.drafted.items():
            self._behind.setdefault(arm, Mean()).add(previous.caught_up.get(arm, 0) / requests, MEMORY)
        if previous.seconds > 0.0:
            self._learn_host(previous)
            if (drafts := previous.rows - previous.requests) and self._rate:
                brought = max(previous.tokens - previous.requests, 0) / drafts / self._rate
                self._brought += (brought / self.correction.factor - self._brought) / RATE_ROUNDS
            self.correction.add(self._expected(previous), previous.seconds)
            self._rounds += 1

    def _expected(self, previous: RoundTime) -> float:
        """Return the uncorrected price of a round that has run."""
        verified = self.tables.verify(previous.rows, previous.requests, previous.context)
        drafted = (self._pass(arm, requests, previous.limits.get(arm, 0)) for arm, requests in previous.drafted.items())
        caught_up = (self.tables.catch(arm, tokens) for arm, tokens in previous.caught_up.items())
        return verified + sum(drafted) + sum(caught_up)

    def _learn_host(self, previous: RoundTime) -> None:
        waited = self._overlaps and previous.gap > WAITED * previous.seconds
        self._busy.add(not waited, RATE_ROUNDS)
        if waited:
            self._host += (previous.seconds + previous.gap - self._host) / 2
        else:
            self._host = min(self._host * FORGOTTEN, previous.seconds)

    def lasts(self, work: float) -> float:
        """Return the seconds of a round whose drafting and verification take `work` seconds: the longer of device and
        host if they overlap, else their sum.
        """
        return max(work, self._host) if self._overlaps else work + self._gap

    def plain(self, requests: int) -> float | None:
        """Return the seconds of a round of `requests` requests without drafts; None until enough rounds were timed.

        Every gain that is shown or counted is relative to this price.
        """
        known = self._rounds >= PLAIN_ROUNDS
        return self.lasts(self.verify(requests, requests)) if known else None

    def plain_price(self) -> dict[str, int]:
        """Return the `rounds` seen, of those `needed` before the price of plain decoding is known; for display."""
        return {"rounds": min(self._rounds, PLAIN_ROUNDS), "needed": PLAIN_ROUNDS}

    def set_contexts(self, contexts: Sequence[int]) -> None:
        """Set upper bounds of the context lengths of the requests in the round that is planned next."""
        self._context, self._requests = sum(contexts), len(contexts)

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

    def width(self, arm: str) -> float:
        """Return the number of rows that a round has for a request routed to `arm`: its drafts and the bonus token."""
        return 1 + self.room(arm)

    def lengths(self, arm: str) -> tuple[int, ...]:
        """Return the lengths that a pass of `arm` may be limited to before it runs, ascending; the last is no limit."""
        return (*sorted(self.tables.shorter.get(arm, ())), self._widest(arm) - 1)

    def longest(self, arm: str) -> int:
        """Return the length of a pass of `arm` without a limit."""
        return self._widest(arm) - 1

    def limit(self, lengths: Mapping[str, int]) -> None:
        """Set by arm the number of drafts to which the round that is planned next limits its passes."""
        self._limits = lengths

    def length(self, arm: str) -> int:
        """Return the most drafts that a pass of `arm` makes in the round that is planned."""
        return self._limits.get(arm, 0) or self.longest(arm)

    def draft(self, arm: str, requests: int, drafts: int = 0) -> float:
        """Return the seconds of a pass of `arm` for `requests` requests, catch-up included; 0 without a model.

        drafts: length of the pass, one of `lengths`; 0: the present limit (`limit`).
        """
        behind = self._behind.get(arm)
        catch_up = self.tables.catch(arm, requests * behind.value) if behind else 0.0
        return self.correction.factor * (self._pass(arm, requests, drafts) + catch_up)

    def verify(self, rows: float, requests: int) -> float:
        """Return the seconds of a target forward over `rows` packed rows, plus the loss assumed for drafts left out."""
        return self.correction.factor * self._filled(requests, rows)[1]

    def packed(self, requests: int, drafts: int, drawn: float = math.inf) -> int:
        """Return the number of drafts that a round of `requests` requests verifies. drafts: how many are worth their
        rows. drawn: how many its passes make at most."""
        return self._filled(requests, requests + drafts, requests + drawn)[0] - requests if drafts else 0

    def worth(self) -> Worth:
        """Return the accepted tokens that a further draft must bring; `FULL_LENGTH` until a rate was measured.

        Only its row is priced: the length of a pass was chosen with the route.
        """
        return Worth(self._rate * self._busy.value * self._row(self._verified)) if self._rate else FULL_LENGTH

    def fitted(self, arms: Iterable[str]) -> dict[tuple[str, str], float]:
        """Return seconds by (kind of work, arm), for one request or one more; the arm is "" if no drafter does it."""
        prices = {
            ("verify", ""): self.correction.factor * self.tables.verify(1, 1, self._context),
            ("verify_row", ""): self._row(1),
            ("between", ""): self._gap,
        }
        for arm in arms:
            alone = self.draft(arm, 1)
            prices["draft", arm], prices["draft_request", arm] = alone, self.draft(arm, 2) - alone
        return prices

    def snapshot(self, arms: Iterable[str]) -> dict[str, Any]:
        """Return the prices of `fitted` as in `GET /whiflash/state`: by kind of work, then by arm if it has one."""
        prices: dict[str, Any] = {}
        for (work, arm), seconds in self.fitted(arms).items():
            if arm:
                prices.setdefault(work, {})[arm] = seconds
            else:
                prices[work] = seconds
        return prices

    def _pass(self, arm: str, requests: int, drafts: int = 0) -> float:
        """Return the uncorrected seconds of a pass of `drafts` drafts; 0: of the present limit."""
        return self.tables.draft(arm, requests, drafts or self._limits.get(arm, 0))

    def _filled(self, requests: int, rows: float, most: float = math.inf) -> tuple[int, float]:
        """Return the rows of the cheapest verification graph for `rows` rows, and its uncorrected seconds plus the loss
        assumed for drafts left out, less the worth of drafts that fill it. most: rows that can be filled.

        If `rows` exceed a graph's size by a few, the smaller graph is used if that costs less than the larger graph.
        The drafts left out are the least likely: each counts as `LEFT_OUT` prices of a row, or as the geometric mean of
        that price and what a draft usually brings if that is more, since rows may be nearly free. A larger graph is
        used if its further rows cost less than the drafts that fill them bring, each `FILLED` prices of a row.
        """
        verify, sizes = self.tables.verify, self.tables.verifications.at_short.sizes
        place, best = bisect_left(sizes, rows), (math.ceil(rows), verify(rows, requests, self._context))
        # Whether a round drafts at all is its route's decision, so some room for drafts is left.
        if not self.tables.steps or not place or rows <= requests:
            return best
        price = self.tables.row(rows, requests, self._context)
        most = min(most, requests * max(map(self._widest, self.tables.drafts), default=1))
        others = [size for size in sizes[place + 1 : place + LARGER] if size <= most]
        if (smaller := sizes[place - 1]) > requests:
            others.append(smaller)
        for size in others:
            each = FILLED * price
            if size < rows:
                each = max(LEFT_OUT * price, math.sqrt(price * self._brought))
            seconds = verify(size, requests, self._context) + (rows - size) * each
            if seconds < best[1]:
                best = size, seconds
        return best

    def _row(self, rows: float) -> float:
        return self.correction.factor * self.tables.row(rows, self._requests, self._context)

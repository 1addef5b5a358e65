"""`assign(scores, costs) → routes` for a whole batch.

Activating another drafter or verifying wider is a cost of the batch, not of one request: drafting runs once
per active arm and verification once for all. So the subsets of active arms are compared by expected tokens
per second; with a handful of arms that is at most a few dozen subsets.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import PLAIN, Forecast
from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.routing.policies import Scores

WITHOUT_A_PASS = (arms.PROMISED, arms.NONE)
"""Choices that run no drafter."""

UNSCORED = {arms.NONE: 0.0}
"""Scores of a request that has none."""

Accepted = Callable[[str, float], float]
"""Mean number of accepted drafts, of so many drafts of an arm."""

MARGIN = 0.02
"""Keeps routes from thrashing: a switch must promise so much more tokens per second, relatively."""


def best_each(scores: Sequence[Scores]) -> list[str]:
    """The arm with the highest score for every request on its own; ties go to the arm named first."""
    return [max(s, key=lambda arm: s[arm]) if s else arms.NONE for s in scores]


class Assignment(NamedTuple):
    """A pass for each request, or none; and by arm, to how many drafts its pass is limited."""

    routes: list[str]
    lengths: Mapping[str, int]


def assign(
    scores: Sequence[Scores],
    costs: Costs | None = None,
    previous: Sequence[str | None] = (),
    margin: float | None = None,
    promised: Sequence[Forecast] = (),
    accepted: Accepted = lambda _, drafts: drafts,
) -> Assignment:
    """One pass per request, or none, with what is promised without one (`arms.PROMISED`) or plainly.

    Args:
        scores: arm → expected accepted tokens of a pass of full length, per request.
        costs: measured latencies; None: every request takes its best arm (the paper's per-request routing).
        previous: the arms of the last round, for the margin; empty: no margin.
        margin: by how much a switch must be better (`MARGIN`); None: it need not be.
        promised: what each request's round promises without a pass, if it scores `arms.PROMISED`.
        accepted: what a limit leaves of a pass.

    Returns:
        The routes with the most expected tokens per second, unless keeping the previous ones is within the margin. The
        lengths are those that are best for these routes.
    """
    if costs is None or not scores:
        return Assignment(best_each(scores), {})
    batch = _Batch(scores, costs, promised, accepted)
    best, (best_rate, lengths) = batch.best()
    if best_rate <= 0.0:
        best, best_rate = best_each(scores), 0.0  # of scores that only order arms
    if margin is not None and len(previous) == len(scores):
        kept = [str(p) if p in s else b for p, s, b in zip(previous, scores, best, strict=True)]
        if kept != best:
            rate, shorter = batch.rate_of(kept)
            if rate * (1 + margin) >= best_rate:
                return Assignment(kept, shorter)
    return Assignment(best, lengths)


def best_rate(
    scores: Sequence[Scores], costs: Costs, promised: Sequence[Forecast], accepted: Accepted
) -> float:
    """Most expected tokens per second, whatever the routes were."""
    return _Batch(scores, costs, promised, accepted).best()[1][0]


class _Batch:
    """Requests by how they rank their arms: of a set of active arms, all that rank them alike take the same.

    A request without scores decodes plainly, and adds nothing to what is expected.
    """

    def __init__(
        self, scores: Sequence[Scores], costs: Costs, promised: Sequence[Forecast], accepted: Accepted
    ) -> None:
        self.scores, self.costs, self.promised = [each or UNSCORED for each in scores], costs, promised
        self.accepted = accepted
        self.names = tuple(sorted({arm for each in self.scores for arm in each} - {arms.NONE}))
        self.rows = {arm: costs.width(arm) for arm in self.names if arm != arms.PROMISED}
        self.limits = {arm: self._limited(arm, rows) for arm, rows in self.rows.items()}
        self.rows[arms.NONE] = PLAIN.rows
        self.alike: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        """Their arms, the best first → the indices of some requests."""
        orders: dict[int, list[str]] = {}
        for index, each in enumerate(self.scores):
            rows = promised[index].rows if arms.PROMISED in each else 0
            if (order := orders.get(rows)) is None:
                # The narrower of two arms with the same score: rows that verify nothing cost the whole batch.
                known = self.rows | {arms.PROMISED: rows}
                order = orders[rows] = sorted([*self.names, arms.NONE], key=known.__getitem__)
            named = order if len(each) == len(order) else [arm for arm in order if arm in each]
            self.alike[tuple(sorted(named, key=each.__getitem__, reverse=True))].append(index)

    def _limited(self, arm: str, rows: float) -> list[tuple[int, float, float]]:
        """Lengths of a pass, rows that a request verifies then, and the share of its accepted drafts that are left.

        rows: without a limit. Those beyond the arm's own drafts are copies behind them, which stay.
        """
        *shorter, longest = self.costs.lengths(arm)
        own = min(rows - 1, longest)
        whole = self.accepted(arm, own) if shorter else 0.0
        limits = [(longest, rows, 1.0)]
        if whole:
            lost = [(drafts, max(own - drafts, 0.0)) for drafts in shorter]
            limits += [
                (drafts, rows - fewer, self.accepted(arm, own - fewer) / whole) for drafts, fewer in lost
            ]
        return limits

    def best(self) -> tuple[list[str], tuple[float, Mapping[str, int]]]:
        """The choices with the most expected tokens per second; how many, and by which lengths of passes. On ties those
        of the smaller set.

        Every request takes its best arm of a set of active ones. Sets without a pinned request's arm are left out.
        """
        best, top, members = tuple[str, ...](), (-math.inf, dict[str, int]()), self.alike.values()
        choices = (
            tuple([next((arm for arm in ranked if arm in active), "") for ranked in self.alike])
            for active in _subsets(self.names, len(self.scores))
        )
        for choice in dict.fromkeys(choices):
            if "" not in choice and (rate := self._rate(zip(choice, members, strict=True)))[0] > top[0]:
                best, top = choice, rate
        routes = [arms.NONE] * len(self.scores)
        for arm, indices in zip(best, members, strict=True):
            for index in indices:
                routes[index] = arm
        return routes, top

    def rate_of(self, routes: Sequence[str]) -> tuple[float, dict[str, int]]:
        """Expected tokens per second of the batch under `routes`, and by which lengths of passes."""
        return self._rate((arm, (index,)) for index, arm in enumerate(routes))

    def _rate(self, parts: Iterable[tuple[str, Sequence[int]]]) -> tuple[float, dict[str, int]]:
        """The same if an arm drafts for these requests, another for those, and so on."""
        expected, rows, scored, drafted = 0.0, 0.0, defaultdict[str, float](float), Counter[str]()
        for arm, indices in parts:
            score = sum([self.scores[index][arm] for index in indices])
            expected += score
            if arm == arms.PROMISED:
                rows += sum([self.promised[index].rows for index in indices])
            else:
                rows += self.rows[arm] * len(indices)
            if arm not in WITHOUT_A_PASS:
                drafted[arm] += len(indices)
                scored[arm] += score
        names, best, lengths = sorted(drafted), -math.inf, dict[str, int]()
        for limits in product(*(self.limits[arm] for arm in names)):
            tokens, verified, drafting = expected, rows, 0.0
            for arm, (drafts, width, share) in zip(names, limits, strict=True):
                requests = drafted[arm]
                tokens -= max(scored[arm] - requests, 0.0) * (1 - share)
                verified -= requests * (self.rows[arm] - width)
                drafting += self.costs.draft(arm, requests, drafts)
            rate = tokens / self.costs.lasts(self.costs.verify(verified, len(self.scores)) + drafting)
            if rate > best:
                best, lengths = rate, {arm: drafts for arm, (drafts, *_) in zip(names, limits, strict=True)}
        return best, lengths


@lru_cache
def _subsets(names: tuple[str, ...], most: int) -> list[frozenset[str]]:
    """Sets of at most `most` arms, and `none` in each: no more are used than there are requests."""
    sizes = range(min(len(names), most) + 1)
    return [frozenset((*chosen, arms.NONE)) for size in sizes for chosen in combinations(names, size)]

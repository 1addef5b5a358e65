"""Assigns arms to the requests of a batch by price: `assign(scores, costs) → routes`.

Another active drafter or a wider verification is a cost of the batch, not of one request: drafting runs once per active
arm and verification once for all. So sets of active arms are compared by expected tokens per second; with a handful of
arms these are at most a few dozen sets.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, combinations, product

from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import PLAIN, Forecast
from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.routing.policies import Scores

WITHOUT_A_PASS = (arms.PROMISED, arms.NONE)
"""Choices without a drafter's pass."""

UNSCORED = {arms.NONE: 0.0}
"""Scores that replace those of a request without any."""

Accepted = Callable[[str, float], float]
"""(arm, drafts) → mean number of accepted drafts of a pass with so many."""

CLASSES = 3
"""Most weights of a batch: each further one multiplies the choices that are rated."""

MARGIN = 0.02
"""Relative gain in tokens per second that a switch must promise, so that routes do not flap."""


def best_each(scores: Sequence[Scores]) -> list[str]:
    """Return the arm with the highest score for each request by itself; ties go to the arm named first."""
    return [max(s, key=lambda arm: s[arm]) if s else arms.NONE for s in scores]


def assign(
    scores: Sequence[Scores],
    costs: Costs | None = None,
    previous: Sequence[str | None] = (),
    margin: float | None = None,
    promised: Sequence[Forecast] = (),
    accepted: Accepted = lambda _, drafts: drafts,
    weights: Sequence[float] = (),
) -> tuple[list[str], Mapping[str, int]]:
    """Choose for each request a drafter's pass, a candidate without a pass (`arms.PROMISED`) or plain decoding.

    Args:
        scores: per request, arm → expected tokens of a round with a pass of full length.
        costs: measured latencies; None: every request takes its best arm (the paper's per-request routing).
        previous: each request's choice in the last round, for the margin; empty: no margin.
        margin: relative gain that a switch must promise (`MARGIN`); None: any gain is enough.
        promised: forecast of each request's best candidate, read if it scores `arms.PROMISED`.
        accepted: mean number of accepted drafts of a limited pass.
        weights: worth of a token of each request (`weights_of`); empty: all are worth the same.

    Returns:
        The arm or `none` of each request: the routes with the most expected tokens per second, or the previous ones if
        these are within the margin. And by arm, the number of drafts that its pass is limited to.
    """
    if costs is None or not scores:
        return best_each(scores), {}
    batch = _Batch(scores, costs, promised, accepted, weights)
    best, (best_rate, lengths) = batch.best()
    if best_rate <= 0.0:
        best, best_rate = best_each(scores), 0.0  # scores of policies that only order arms
    if margin is not None and len(previous) == len(scores):
        kept = [str(p) if p in s else b for p, s, b in zip(previous, scores, best, strict=True)]
        if kept != best:
            rate, shorter = batch.rate_of(kept)
            if rate * (1 + margin) >= best_rate:
                return kept, shorter
    return best, lengths


def best_rate(
    scores: Sequence[Scores], costs: Costs, promised: Sequence[Forecast], accepted: Accepted, weights: Sequence[float]
) -> float:
    """Return the expected tokens per second of the best routes, without a margin for the previous ones."""
    return _Batch(scores, costs, promised, accepted, weights).best()[1][0]


def weights_of(priorities: Sequence[int]) -> list[float]:
    """Return the worth of a token of each request: a priority counts half as much as the next higher one of the batch.

    Only the order counts, as in SGLang's queue, since operators choose any numbers. The priorities from the third on
    count alike.
    """
    classes = {priority: number for number, priority in enumerate(sorted(set(priorities), reverse=True))}
    worth = {priority: 0.5 ** min(number, CLASSES - 1) for priority, number in classes.items()}
    return [worth[priority] for priority in priorities]


class _Batch:
    """Groups a batch's requests by weight and by their ranking of the arms, and rates choices of arms by price. From
    any set of arms, all requests of a group take the same one.

    A request without scores decodes plainly and counts as no tokens.
    """

    def __init__(
        self,
        scores: Sequence[Scores],
        costs: Costs,
        promised: Sequence[Forecast],
        accepted: Accepted,
        weights: Sequence[float],
    ) -> None:
        self.scores, self.costs, self.promised = [each or UNSCORED for each in scores], costs, promised
        self.accepted, self.weights = accepted, weights or [1.0] * len(scores)
        self.names = tuple(sorted({*chain.from_iterable(self.scores)} - {arms.NONE}))
        self.rows = {arm: costs.width(arm) for arm in self.names if arm != arms.PROMISED}
        self.limits = {arm: self._limited(arm, rows) for arm, rows in self.rows.items()}
        self.rows[arms.NONE] = PLAIN.rows
        self.alike: defaultdict[tuple[float, tuple[str, ...]], list[int]] = defaultdict(list)
        """Weight, and arms ranked by score, best first → indices of these requests."""
        orders: dict[int, list[str]] = {}
        for index, each in enumerate(self.scores):
            rows = promised[index].rows if arms.PROMISED in each else 0
            if (order := orders.get(rows)) is None:
                # If two arms have the same score, the narrower one comes first: rows cost the whole batch.
                known = self.rows | {arms.PROMISED: rows}
                order = orders[rows] = sorted([*self.names, arms.NONE], key=known.__getitem__)
            named = order if len(each) == len(order) else [arm for arm in order if arm in each]
            ranked = tuple(sorted(named, key=each.__getitem__, reverse=True))
            self.alike[self.weights[index], ranked].append(index)

    def _limited(self, arm: str, rows: float) -> list[tuple[int, float, float]]:
        """Return the lengths that a pass may have, each with a request's verified rows and its share of the accepted
        drafts of a full pass.

        rows: verified rows with a full pass. Those beyond the arm's own drafts are copies, which a limit keeps.
        """
        *shorter, longest = self.costs.lengths(arm)
        own = min(rows - 1, longest)
        whole = self.accepted(arm, own) if shorter else 0.0
        limits = [(longest, rows, 1.0)]
        if whole:
            lost = [(drafts, max(own - drafts, 0.0)) for drafts in shorter]
            limits += [(drafts, rows - fewer, self.accepted(arm, own - fewer) / whole) for drafts, fewer in lost]
        return limits

    def best(self) -> tuple[list[str], tuple[float, Mapping[str, int]]]:
        """Return the choices with the most expected tokens per second, that rate, and the lengths of passes it needs.
        Ties go to the smaller set.

        In a set of active arms every request takes its best one, or requests of a lower weight decode plainly where
        rows are scarce. Sets that lack a pinned request's arm are skipped.
        """
        best: tuple[str, ...] = ()
        top: tuple[float, dict[str, int]] = (-math.inf, {})
        members = self.alike.values()
        choices = (
            tuple(
                [
                    next((arm for arm in ranked if arm in (active if weight >= least else UNSCORED)), "")
                    for weight, ranked in self.alike
                ]
            )
            for least in sorted(set(self.weights))
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
        """Return the most expected tokens per second of the batch under `routes`, and the lengths of passes by arm."""
        return self._rate((arm, (index,)) for index, arm in enumerate(routes))

    def _rate(self, parts: Iterable[tuple[str, Sequence[int]]]) -> tuple[float, dict[str, int]]:
        """Return the most tokens a second if the arms of `parts` draft for their requests, and lengths of passes."""
        expected, rows = 0.0, 0.0
        gained: defaultdict[str, float] = defaultdict(float)
        drafted: defaultdict[str, int] = defaultdict(int)
        for arm, indices in parts:
            score = sum([self.weights[index] * self.scores[index][arm] for index in indices])
            expected += score
            if arm == arms.PROMISED:
                rows += sum([self.promised[index].rows for index in indices])
            else:
                rows += self.rows[arm] * len(indices)
            if arm not in WITHOUT_A_PASS:
                drafted[arm] += len(indices)
                gained[arm] += score - sum([self.weights[index] for index in indices])
        names, best = sorted(drafted), -math.inf
        lengths: dict[str, int] = {}
        for limits in product(*(self.limits[arm] for arm in names)):
            tokens, verified, drafting = expected, rows, 0.0
            for arm, (drafts, width, share) in zip(names, limits, strict=True):
                requests = drafted[arm]
                tokens -= max(gained[arm], 0.0) * (1 - share)
                verified -= requests * (self.rows[arm] - width)
                drafting += self.costs.draft(arm, requests, drafts)
            rate = tokens / self.costs.lasts(self.costs.verify(verified, len(self.scores)) + drafting)
            if rate > best:
                best, lengths = rate, {arm: drafts for arm, (drafts, *_) in zip(names, limits, strict=True)}
        return best, lengths


@lru_cache
def _subsets(names: tuple[str, ...], most: int) -> list[frozenset[str]]:
    """Return all sets of at most `most` of these arms, each with `none`: no more arms are used than requests exist."""
    sizes = range(min(len(names), most) + 1)
    return [frozenset((*chosen, arms.NONE)) for size in sizes for chosen in combinations(names, size)]

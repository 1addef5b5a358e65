"""`assign(scores, costs) → routes` for a whole batch.

Activating another drafter or verifying wider is a cost of the batch, not of one request: drafting runs once
per active arm and verification once for all. So the subsets of active arms are compared by expected tokens
per second; with a handful of arms that is at most a few dozen subsets.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

from whiflash_sglang import arms
from whiflash_sglang.routing.signals import Forecast

Scores = Mapping[str, float]

Told = Mapping[str, Forecast]
"""The arms' forecasts of a request's round: how many rows they would verify, for one."""


class Costs(Protocol):
    """Measured latencies, in seconds."""

    def draft(self, arm: str, requests: int) -> float:
        """One draft pass of `arm`, catch-up included, for `requests` requests."""
        ...

    def verify(self, rows: float, requests: int) -> float:
        """One target forward over `rows` packed rows, and the round's fixed cost."""
        ...

    def width(self, arm: str) -> float:
        """Rows that a request routed to `arm` usually adds to verification (drafts + 1), where it does not say so."""
        ...

    def timings(self, arm: str) -> int:
        """How often a draft of `arm` was timed since its price was last found wrong."""
        ...


@dataclass(frozen=True, slots=True)
class Dwell:
    """Keeps routes from thrashing: a switch must promise `margin` (relative) more tokens per second."""

    margin: float = 0.05


def best_each(scores: Sequence[Scores]) -> list[str]:
    """The arm with the highest score for every request on its own; ties go to the arm named first."""
    return [max(s, key=lambda arm: s[arm]) if s else arms.NONE for s in scores]


def assign(
    scores: Sequence[Scores],
    costs: Costs | None = None,
    previous: Sequence[str | None] = (),
    dwell: Dwell | None = None,
    told: Sequence[Told] = (),
) -> list[str]:
    """One arm per request.

    Args:
        scores: arm → expected accepted tokens, per request.
        costs: measured latencies; None: every request takes its best arm (the paper's per-request routing).
        previous: the arms of the last round, for the margin; empty: no margin.
        dwell: margin against thrashing.
        told: the arms' forecasts of each request's round; empty: none.

    Returns:
        The routes with the most expected tokens per second, unless keeping the previous ones is within the margin.
    """
    if costs is None or not scores:
        return best_each(scores)
    told = told or [{}] * len(scores)
    best, best_rate = best_each(scores), 0.0
    for active in _subsets({arm for s in scores for arm in s} - {arms.NONE}, most=len(scores)):
        if any(s and not s.keys() & (active | {arms.NONE}) for s in scores):
            continue  # A pinned request's arm is not active.
        routes = [_best_within(s, active, costs, own) for s, own in zip(scores, told, strict=True)]
        rate = expected_rate(scores, routes, costs, told)
        if rate > best_rate:
            best, best_rate = routes, rate
    if dwell is not None and len(previous) == len(scores):
        kept = [p if p in s else b for p, s, b in zip(previous, scores, best, strict=True)]
        if expected_rate(scores, [str(k) for k in kept], costs, told) * (1 + dwell.margin) >= best_rate:
            return [str(k) for k in kept]
    return best


def expected_rate(
    scores: Sequence[Scores], routes: Sequence[str], costs: Costs, told: Sequence[Told]
) -> float:
    """Expected tokens per second of a batch under `routes`."""
    counts: dict[str, int] = {}
    for arm in routes:
        counts[arm] = counts.get(arm, 0) + 1
    rows = sum(_rows(arm, own, costs) for arm, own in zip(routes, told, strict=True))
    seconds = costs.verify(rows, len(routes))
    seconds += sum(costs.draft(arm, count) for arm, count in counts.items() if arm != arms.NONE)
    return sum(s[arm] for s, arm in zip(scores, routes, strict=True) if s) / seconds


def _subsets(active: Iterable[str], most: int) -> Iterable[frozenset[str]]:
    """Sets of at most `most` arms: no more are used than there are requests."""
    ordered = sorted(active)
    for size in range(min(len(ordered), most) + 1):
        for chosen in combinations(ordered, size):
            yield frozenset(chosen)


def _rows(arm: str, told: Told, costs: Costs) -> float:
    return told[arm].rows if arm in told else costs.width(arm)


def _best_within(scores: Scores, active: frozenset[str], costs: Costs, told: Told) -> str:
    """The request's best active arm, narrower first on ties: rows that verify nothing cost the whole batch."""
    allowed = [arm for arm in scores if arm in active or arm == arms.NONE]
    return max(allowed, key=lambda arm: (scores[arm], -_rows(arm, told, costs)), default=arms.NONE)

"""`assign(scores, costs) → routes` for a whole batch.

Activating another drafter or verifying wider is a cost of the batch, not of one request: drafting runs once
per active arm and verification once for all. So the subsets of active arms are compared by expected tokens
per second; with a handful of arms that is at most a few dozen subsets.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import PLAIN, Forecast
from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.routing.policies import Scores

WITHOUT_A_PASS = (arms.PROMISED, arms.NONE)
"""Choices that run no drafter."""


MARGIN = 0.02
"""Keeps routes from thrashing: a switch must promise so much more tokens per second, relatively."""


def best_each(scores: Sequence[Scores]) -> list[str]:
    """The arm with the highest score for every request on its own; ties go to the arm named first."""
    return [max(s, key=lambda arm: s[arm]) if s else arms.NONE for s in scores]


def assign(
    scores: Sequence[Scores],
    costs: Costs | None = None,
    previous: Sequence[str | None] = (),
    margin: float | None = None,
    promised: Sequence[Forecast] = (),
) -> list[str]:
    """One pass per request, or none, with what is promised without one (`arms.PROMISED`) or plainly.

    Args:
        scores: arm → expected accepted tokens, per request.
        costs: measured latencies; None: every request takes its best arm (the paper's per-request routing).
        previous: the arms of the last round, for the margin; empty: no margin.
        margin: by how much a switch must be better (`MARGIN`); None: it need not be.
        promised: what each request's round promises without a pass, if it scores `arms.PROMISED`.

    Returns:
        The routes with the most expected tokens per second, unless keeping the previous ones is within the margin.
    """
    if costs is None or not scores:
        return best_each(scores)
    batch = _Batch.of(scores, costs, promised)
    choices = batch.best_choices()
    rates = batch.rates(choices)
    first = int(rates.argmax())
    if rates[first] <= 0.0:
        best, best_rate = best_each(scores), 0.0  # of scores that only order arms
    else:
        best, best_rate = batch.arms_of(choices[first]), float(rates[first])
    if margin is not None and len(previous) == len(scores):
        kept = [str(p) if p in s else b for p, s, b in zip(previous, scores, best, strict=True)]
        if kept == best or batch.rate(kept) * (1 + margin) >= best_rate:
            return kept
    return best


def best_rate(scores: Sequence[Scores], costs: Costs, promised: Sequence[Forecast]) -> float:
    """Most expected tokens per second, whatever the routes were."""
    batch = _Batch.of(scores, costs, promised)
    return float(batch.rates(batch.best_choices()).max())


@dataclass(frozen=True, slots=True)
class _Batch:
    """R requests with A choices, `none` the last: so that a subset of arms is priced for all at once.

    scores: [R, A] float64, -inf for an arm that a request must not use. rows: [R, A] float64, to verify.
    """

    arms: list[str]
    scores: npt.NDArray[np.float64]
    rows: npt.NDArray[np.float64]
    costs: Costs

    @classmethod
    def of(cls, scores: Sequence[Scores], costs: Costs, promised: Sequence[Forecast]) -> "_Batch":
        """A request without scores decodes plainly, and adds nothing to what is expected."""
        names = [*sorted({arm for each in scores for arm in each} - {arms.NONE}), arms.NONE]
        widths = [PLAIN.rows if arm in WITHOUT_A_PASS else costs.width(arm) for arm in names]
        rows = np.tile(np.array(widths, dtype=float), (len(scores), 1))
        if arms.PROMISED in names:
            rows[:, names.index(arms.PROMISED)] = [forecast.rows for forecast in promised]
        known = [[each.get(arm, -math.inf) for arm in names] if each else _plain(names) for each in scores]
        return cls(names, np.array(known), rows, costs)

    def best_choices(self) -> npt.NDArray[np.intp]:
        """[subsets, R] columns: every request's best arm of each set of active ones, narrower first on ties.

        Rows that verify nothing cost the whole batch. Sets without a pinned request's arm are left out.
        """
        subsets = _subsets(self.arms[:-1], most=len(self.scores))
        active = np.array([[arm in chosen or arm == arms.NONE for arm in self.arms] for chosen in subsets])
        within = np.where(active[:, None, :], self.scores, -math.inf)
        best = within.max(-1)
        choices: npt.NDArray[np.intp] = np.where(within == best[..., None], self.rows, math.inf).argmin(-1)
        possible: npt.NDArray[np.intp] = choices[(best > -math.inf).all(-1)]
        return possible

    def rates(self, choices: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        """Expected tokens per second of each row of `choices` [S, R]."""
        requests = np.arange(len(self.scores))
        rows = self.rows[requests, choices].sum(-1).tolist()
        counts = (choices[..., None] == np.arange(len(self.arms) - 1)).sum(1).tolist()
        draft, verify = cache(self.costs.draft), cache(self.costs.verify)
        seconds = [
            self.costs.lasts(
                verify(width, len(requests))
                + sum(
                    draft(arm, n)
                    for arm, n in zip(self.arms, drafted, strict=False)
                    if n and arm not in WITHOUT_A_PASS
                )
            )
            for width, drafted in zip(rows, counts, strict=True)
        ]
        rates: npt.NDArray[np.float64] = self.scores[requests, choices].sum(-1) / np.array(seconds)
        return rates

    def rate(self, routes: Sequence[str]) -> float:
        """Expected tokens per second of the batch under `routes`."""
        return float(self.rates(np.array([[self.arms.index(arm) for arm in routes]]))[0])

    def arms_of(self, choice: npt.NDArray[np.intp]) -> list[str]:
        return [self.arms[place] for place in choice.tolist()]


def _plain(names: Sequence[str]) -> list[float]:
    return [0.0 if arm == arms.NONE else -math.inf for arm in names]


def _subsets(active: Sequence[str], most: int) -> Iterable[frozenset[str]]:
    """Sets of at most `most` arms: no more are used than there are requests."""
    for size in range(min(len(active), most) + 1):
        for chosen in combinations(active, size):
            yield frozenset(chosen)

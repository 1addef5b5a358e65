"""Routes a batch: scores each request by the policy and its hints, then assigns arms by price. Imports no SGLang."""

import math
from collections.abc import Iterable, Mapping, Sequence

from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import PLAIN, Forecast
from whiflash_sglang.prices.costs import FULL_LENGTH, Costs, Worth
from whiflash_sglang.records.request import Request
from whiflash_sglang.records.signals import Decision, Signals
from whiflash_sglang.routing.assign import MARGIN, Accepted, assign, best_rate, weights_of
from whiflash_sglang.routing.policies import Policy, Scores, apply_hints
from whiflash_sglang.spans.tracker import SpanTracker

Forecasts = Mapping[str, Forecast | None]
"""By arm that may draft for a request, its forecast of the round; None for an arm that forecasts nothing."""


class Controller:
    """Keeps the running requests by row, routes their rounds by one policy, and learns from the results.

    Args:
        policy: scores one request. costs: measured latencies, used if the policy prices batches.
        token_bytes: bytes of every token of the vocabulary, to find spans; empty: spans are not followed.
    """

    def __init__(self, policy: Policy, costs: Costs, token_bytes: Sequence[bytes]) -> None:
        self.policy = policy
        self.costs = costs
        self.states: dict[int, Request] = {}
        self._token_bytes = token_bytes

    def open(self, request: Request, output: Sequence[int]) -> None:
        """Add a request that begins in its row. output: tokens that it produced before a retraction."""
        self.states[request.row], request.running = request, True
        if request.hints.spans and self._token_bytes:
            request.follow(SpanTracker(request.hints.spans, self._token_bytes), output)

    def state(self, row: int, rid: str) -> Request:
        """Return the request `rid` in `row`; if it has ended, a new `Request` that is not running and not stored."""
        request = self.states.get(row)
        return request if request is not None and request.rid == rid else Request(rid, row=row)

    def close(self, request: Request) -> None:
        """Remove a request that has left, with everything that drafters keep of it."""
        del self.states[request.row]
        request.running = False
        request.kept.clear()

    def route(self, requests: Sequence[Request], forecasts: Sequence[Forecasts]) -> list[str]:
        """Choose a drafter's pass or `none` for each request; see the function `route`."""
        return route(self.policy, requests, forecasts, self.costs)

    def named(self, request: Request, names: Iterable[str]) -> list[str]:
        """Return the arms of `names` that the request's next round may be routed to; others need not draft for it."""
        if request.hints.off:
            return []
        candidates, span = self.policy.candidates, request.span
        if candidates is None:
            return list(names)
        pinned = span.prefer if span is not None and span.pin else None
        return [arm for arm in names if arm in candidates or arm == pinned]

    def worth(self) -> Worth:
        """Return the accepted tokens that a further draft must bring; `FULL_LENGTH` if the policy prices nothing."""
        return self.costs.worth() if self.policy.prices_batches else FULL_LENGTH

    def committed(
        self,
        request: Request,
        decision: Decision,
        arm: str,
        tokens: Sequence[int],
        width: int,
        start: int = 0,
        lengths: Mapping[str, int] | None = None,
        right: int = 0,
    ) -> bool:
        """Learn that a round of `arm` committed `tokens` of a request, the bonus token last.

        Args:
            decision: the round's own decision; the request may have a newer one by now.
            width: rows that it verified. start: n when it began. lengths: by arm that drafted, tokens that it would
                have committed alone; None: `arm` committed `tokens`. right: accepted drafts if more than all `tokens`
                but the last: an answer that ends in its drafts has no bonus token, and drafts behind its end are no
                evidence.

        Returns whether the round is evidence for other requests too (`Decision.free`).
        """
        lengths, free = {arm: len(tokens)} if lengths is None else lengths, decision.free
        whole = {each: self._unlimited(each, length, decision.limit) for each, length in lengths.items()}
        if free:
            for each, length in whole.items():
                self.policy.observe(each, decision, length)
            drafts = min(width - 1, decision.limit, right if right == len(tokens) else width)
            self.policy.judge(arm, drafts, min(max(right, len(tokens) - 1), drafts))
        request.committed(arm, tokens, width - 1, start=start, reason=decision.reason, lengths=whole)
        return free

    def _unlimited(self, arm: str, length: int, limit: int) -> float:
        """Estimate the tokens that a round would have committed with a pass of full length: if all drafts of a limited
        pass were accepted, the mean of further accepted drafts is added.
        """
        if not 0 < length - 1 == limit < (most := self.costs.longest(arm)):
            return length
        return length + self.policy.accepted(arm, most, limit)

    def wanted(self, request: Request, decision: Decision, priced_as: str, drafts: int) -> None:
        """Learn how many drafts a round had before some were left out. A pass that ends at its limit counts with the
        arm's full length, since it might have been longer."""
        if 0 < drafts == decision.limit:
            drafts = max(drafts, self.costs.longest(priced_as))
        self.costs.wanted(priced_as, drafts, request.wanted[priced_as])


def route(
    policy: Policy, requests: Sequence[Request], forecasts: Sequence[Forecasts], costs: Costs | None
) -> list[str]:
    """Choose and record each request's arm, or `none`, for the next round. costs: None if nothing has a price."""
    priced = policy.prices_batches
    scores: list[Scores] = []
    sources: list[str] = []
    promised: list[Forecast] = []
    teachers: list[Signals | None] = []
    previous = [request.decision.keeps for request in requests]
    weights = weights_of([request.priority for request in requests])
    for request, forecast, kept in zip(requests, forecasts, previous, strict=True):
        scored, source = _scored(request, policy, forecast), arms.NONE
        decision, expected = request.decision, request.expected
        if expected:
            scored, source = _of_passes(scored, expected, priced=priced)
        promised.append(expected.get(source, PLAIN))
        if decision.reason == "span" and not decision.free:
            scored = _ordered(decision, scored, source, costs, kept, promised[-1], policy.accepted)
        scores.append(scored)
        sources.append(source)
        teachers.append(request if decision.free else None)

    def bound(probes: Mapping[int, str]) -> list[Scores]:
        return [{probes[i]: each[probes[i]]} if i in probes else each for i, each in enumerate(scores)]

    def loss(probes: Mapping[int, str]) -> float:
        if costs is None or not (best := best_rate(scores, costs, promised, policy.accepted, weights)):
            return math.inf
        return 1 - best_rate(bound(probes), costs, promised, policy.accepted, weights) / best

    probes = policy.probe(teachers, loss)
    scores = bound(probes) if probes else scores
    chosen, lengths = (
        assign(scores, costs, previous, MARGIN, promised, policy.accepted, weights) if priced else assign(scores)
    )
    if costs is not None:
        costs.limit(lengths)
    for index, (request, arm, source) in enumerate(zip(requests, chosen, sources, strict=True)):
        decision = request.decision
        decision.only = _usable(policy, decision, arm, source, weights[index])
        decision.promised, decision.keeps = arm == arms.PROMISED, None if index in probes else arm
        decision.limit = lengths.get(arm, 0)
        request.chose(arms.NONE if arm == arms.PROMISED else arm)
    return [arms.NONE if arm == arms.PROMISED else arm for arm in chosen]


def _of_passes(scores: Scores, expected: Mapping[str, Forecast], *, priced: bool) -> tuple[Scores, str]:
    """Return the scores of drafter passes, with the best score that needs no pass as `PROMISED`, and the source of that
    score, or `none`.

    priced: whether plain decoding keeps a score of its own, because the rows of a candidate may not pay.
    """
    best, top = arms.NONE, scores.get(arms.NONE, -math.inf)
    for arm in expected:
        if arm in scores and scores[arm] >= top:
            best, top = arm, scores[arm]
    left = {arm: score for arm, score in scores.items() if arm not in expected}
    if best != arms.NONE:
        plain = left.pop(arms.NONE, None)
        left[arms.PROMISED] = top
        if priced and plain is not None:
            left[arms.NONE] = plain
    return left, best


def _usable(policy: Policy, decision: Decision, chosen: str, source: str, weight: float) -> str | None:
    """Return the one source whose candidates may be verified, `none`, or None for all. source: see `_of_passes`."""
    if policy.joins_arms and decision.reason != "pin":
        # The device knows newer text than the host, so it weighs candidates again if rows have a price. It knows no
        # priorities: a request that left its rows to a more urgent one must not take them.
        weighed = policy.prices_batches and decision.free and weight == 1.0
        if weighed or chosen != arms.NONE or not decision.expected:
            return None
    return source if chosen == arms.PROMISED else arms.NONE


def _ordered(
    decision: Decision,
    scores: Scores,
    source: str,
    costs: Costs | None,
    kept: str | None,
    promised: Forecast,
    accepted: Accepted,
) -> Scores:
    """Choose the arm of a request whose caller set a bias, and return it with its score without the bias.

    The bias decides within the request only. If it counted in the batch, up to sixteen tokens that are never emitted
    would make other requests' drafts look expensive.
    """
    ((arm,), _) = assign([scores], costs, [kept], MARGIN, [promised], accepted)
    drafting, span = source if arm == arms.PROMISED else arm, decision.span
    bias = sum(added for biased, added in span.bias.items() if biased == drafting) if span else 0.0
    return {arm: max(scores[arm] - bias, 1.0)}


def _scored(request: Request, policy: Policy, forecast: Forecasts) -> Scores:
    """Return the policy's scores with the request's hints applied; store a new `Decision` with its signals."""
    request.foresee(forecast)
    scores, reason = apply_hints(
        policy.score(request),
        request.span,
        request.allowed,
        off=request.hints.off,
        measured=request.recent if policy.prices_batches else None,
    )
    request.decision = Decision(
        request.entropy,
        request.span,
        request.expected,
        request.predicted,
        request.tried,
        request.recent,
        request.adapter,
        reason,
    )
    return scores

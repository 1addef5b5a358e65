"""Routes for a batch, from what every request's lane knows and what the batch costs. Imports no SGLang."""

import math
from collections.abc import Mapping, Sequence

from whiflash_sglang.routing.assign import Costs, Dwell, assign
from whiflash_sglang.routing.costs import FULL_LENGTH, WorkerCosts, Worth
from whiflash_sglang.routing.lane import Decision, Lane
from whiflash_sglang.routing.policies import PROBE_ROUNDS, Policy, Scores
from whiflash_sglang.routing.signals import Outlook
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.tracker import SpanTracker
from whiflash_sglang.telemetry.trace import Recording

Outlooks = Mapping[str, Outlook | None]
"""Arms that may draft for a request, with what those say of the round that look before they draft."""


class Controller:
    """One lane per running request, one policy for all.

    Args:
        policy: scores one request. costs: measured latencies, read by policies that price batches.
        token_bytes: bytes of every token, for spans; empty: spans are not followed.
    """

    def __init__(self, policy: Policy, costs: WorkerCosts, token_bytes: Sequence[bytes]) -> None:
        self.policy = policy
        self.costs = costs
        self.lanes: dict[int, Lane] = {}
        self._token_bytes = token_bytes

    def open(
        self,
        row: int,
        rid: str,
        hints: RequestHints,
        output: Sequence[int],
        recording: Recording | None = None,
    ) -> None:
        """A request begins in `row`, with the `output` it had before a retraction, and its trace if it has one."""
        lane = self.lanes[row] = Lane(rid, hints, row, recording=recording)
        if hints.spans and self._token_bytes:
            lane.tracker = SpanTracker(hints.spans, self._token_bytes)
            lane.tracker.push(output)

    def holds(self, row: int, rid: str) -> bool:
        """Whether `row` is the lane of request `rid`."""
        lane = self.lanes.get(row)
        return lane is not None and lane.rid == rid

    def lane(self, row: int, rid: str) -> Lane:
        """What is kept of request `rid` in `row`; of one that has ended a blank that nobody keeps."""
        return self.lanes[row] if self.holds(row, rid) else Lane(rid, row=row)

    def keeps(self, lane: Lane) -> bool:
        """Whether the request of `lane` still runs: it has not ended, nor been retracted and begun again."""
        return self.lanes.get(lane.row) is lane

    def route(self, rows: Sequence[int], outlooks: Sequence[Outlooks]) -> list[str]:
        """One arm per request."""
        return route(self.policy, [self.lanes[row] for row in rows], outlooks, self.costs)

    def may_name(self, row: int, arm: str) -> bool:
        """Whether the next round of the request in `row` may be routed to `arm`; others need not be asked."""
        lane, candidates = self.lanes[row], self.policy.candidates
        if lane.hints.off:
            return False
        if candidates is None or arm in candidates:
            return True
        span = lane.span
        return span is not None and span.pin and span.prefer == arm

    def may_join(self, row: int) -> bool:
        """Whether the drafts of the request in `row` may be prolonged by another arm than the one it was routed to."""
        return self.policy.joins_arms and self.lanes[row].decision.reason != "pin"

    def must_beat(self, row: int, route: str, other: str) -> float:
        """What drafts of `other` must bring a request that was routed to `route`, net of their rows, to take its place.

        Expected accepted tokens; infinite where they may not. For arms of which the device alone knows in time what
        they expect.
        """
        lane, policy = self.lanes[row], self.policy
        if route == other:
            return -math.inf
        if lane.decision.reason in ("pin", "off") or not self.may_name(row, other):
            return math.inf
        if not policy.prices_batches:
            # Who names no other arm but this one, or this one first, takes it wherever it has something.
            return math.inf if policy.candidates is None else -math.inf
        return lane.expected - 1 - self.worth(other).row * (self.costs.width(route) - 1)

    def worth(self, arm: str) -> Worth:
        """What a further draft token of `arm` must bring; policies that price nothing draft the full length."""
        return self.costs.worth(arm) if self.policy.prices_batches else FULL_LENGTH

    def committed(
        self, lane: Lane, decision: Decision, arm: str, tokens: Sequence[int], width: int, start: int = 0
    ) -> bool:
        """A round of `arm` committed `tokens` of the request in `lane`, the bonus token last.

        Args:
            decision: what the round was decided on, which the lane's next rounds may have left behind.
            width: rows that it verified. start: n when it began.

        Returns whether the round is evidence for other requests too (`Decision.free`).
        """
        if decision.free:
            self.policy.observe(arm, decision.signals, len(tokens))
            self.costs.widened(arm, width)
        lane.committed(arm, tokens, width - 1, start=start, reason=decision.reason)
        return decision.free

    def forget(self, row: int) -> None:
        """The request in `row` is gone."""
        self.lanes.pop(row, None)


def route(
    policy: Policy,
    lanes: Sequence[Lane],
    outlooks: Sequence[Outlooks],
    costs: Costs | None,
) -> list[str]:
    """One arm per request; every lane is told its own. costs: None where nothing costs."""
    scores = [lane.score(policy, outlook) for lane, outlook in zip(lanes, outlooks, strict=True)]
    scores = [_ordered(lane, own, costs) for lane, own in zip(lanes, scores, strict=True)]
    free = [lane.decision.signals if lane.decision.free else None for lane in lanes]
    for index, arm in policy.probe(free, costs.timings if costs else lambda _: PROBE_ROUNDS).items():
        scores[index] = {arm: scores[index][arm]}
    if policy.prices_batches:
        told = [lane.decision.signals.expected for lane in lanes]
        routes = assign(scores, costs, [lane.previous for lane in lanes], Dwell(), told)
    else:
        routes = assign(scores)
    for lane, arm, own in zip(lanes, routes, scores, strict=True):
        lane.chose(arm, own.get(arm, 1.0))
    return routes


def _ordered(lane: Lane, scores: Scores, costs: Costs | None) -> Scores:
    """The scores; of a request with a bias, its choice alone at what the policy expects of it.

    A bias is worth what its caller says to that request only. Weighed against the tokens of others, sixteen tokens a
    round that nobody gets would make their drafts look dear.
    """
    span = lane.decision.signals.span
    if lane.decision.free or span is None or lane.decision.reason != "span":
        return scores
    (arm,) = assign([scores], costs, [lane.previous], Dwell(), [lane.decision.signals.expected])
    return {arm: max(scores[arm] - span.bias.get(arm, 0.0), 1.0)}

"""Routes for a batch, from what every request's lane knows and what the batch costs. Imports no SGLang."""

from collections.abc import Mapping, Sequence

from whiflash_sglang.routing.assign import Dwell, assign
from whiflash_sglang.routing.costs import FULL_LENGTH, MeasuredCosts, Worth
from whiflash_sglang.routing.lane import Lane
from whiflash_sglang.routing.policies import Policy
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.tracker import SpanTracker
from whiflash_sglang.trace import TraceLog

Outlook = Mapping[str, float | None]
"""Arms that may draft for a request, with the acceptance length of those that know it beforehand."""


class Controller:
    """One lane per running request, one policy for all.

    Args:
        policy: scores one request. costs: measured latencies, read by policies that price batches.
        token_bytes: bytes of every token, for spans; empty: spans are not followed.
        trace_log: where rounds of traced requests go.
    """

    def __init__(
        self, policy: Policy, costs: MeasuredCosts, token_bytes: Sequence[bytes], trace_log: TraceLog
    ) -> None:
        self.policy = policy
        self.costs = costs
        self.lanes: dict[int, Lane] = {}
        self._token_bytes = token_bytes
        self._trace_log = trace_log

    def open(self, row: int, rid: str, hints: RequestHints, output: Sequence[int]) -> None:
        """A request begins in `row`, with the `output` it had before a retraction."""
        lane = self.lanes[row] = Lane(rid, hints)
        if hints.spans and self._token_bytes:
            lane.tracker = SpanTracker(hints.spans, self._token_bytes)
            lane.tracker.push(output)
        if hints.trace:
            self._trace_log.open(rid)

    def holds(self, row: int, rid: str) -> bool:
        """Whether `row` is the lane of request `rid`."""
        lane = self.lanes.get(row)
        return lane is not None and lane.rid == rid

    def route(self, rows: Sequence[int], lengths: Sequence[int], outlooks: Sequence[Outlook]) -> list[str]:
        """One arm per request."""
        lanes = [self.lanes[row] for row in rows]
        scores = [
            lane.score(self.policy, n, outlook)
            for lane, n, outlook in zip(lanes, lengths, outlooks, strict=True)
        ]
        if self.policy.prices_batches:
            routes = assign(scores, self.costs, [lane.previous for lane in lanes], Dwell())
        else:
            routes = assign(scores)
        self.policy.routed(routes)
        for lane, arm in zip(lanes, routes, strict=True):
            lane.chose(arm)
        return routes

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
        return self.policy.joins_arms and self.lanes[row].reason != "pin"

    def worth(self, arm: str) -> Worth:
        """What a further draft token of `arm` must bring; policies that price nothing draft the full length."""
        return self.costs.worth(arm) if self.policy.prices_batches else FULL_LENGTH

    def committed(self, row: int, arm: str, tokens: Sequence[int]) -> None:
        """A round of `arm` committed `tokens` of the request in `row`, the bonus token last."""
        lane = self.lanes[row]
        self.policy.observe(arm, lane.decided_on, len(tokens))
        self._trace_log.record(lane.rid, lane.committed(arm, tokens))

    def forget(self, row: int) -> None:
        """The request in `row` is gone."""
        self.lanes.pop(row, None)

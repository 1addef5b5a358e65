"""Routes for a batch, from what every request's state knows and what the batch costs. Imports no SGLang."""

from collections.abc import Mapping, Sequence

from whiflash_sglang.routing.assign import Costs, Dwell, assign
from whiflash_sglang.routing.costs import FULL_LENGTH, WorkerCosts, Worth
from whiflash_sglang.routing.policies import PROBE_ROUNDS, Policy, Scores
from whiflash_sglang.routing.request_state import Decision, RequestState
from whiflash_sglang.routing.signals import Forecast
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.tracker import SpanTracker
from whiflash_sglang.telemetry.trace import Recording

Forecasts = Mapping[str, Forecast | None]
"""Arms that may draft for a request, with what those say of the round that look before they draft."""


class Controller:
    """One state per running request, one policy for all.

    Args:
        policy: scores one request. costs: measured latencies, read by policies that price batches.
        token_bytes: bytes of every token, for spans; empty: spans are not followed.
    """

    def __init__(self, policy: Policy, costs: WorkerCosts, token_bytes: Sequence[bytes]) -> None:
        self.policy = policy
        self.costs = costs
        self.states: dict[int, RequestState] = {}
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
        state = self.states[row] = RequestState(rid, hints, row, recording=recording)
        if hints.spans and self._token_bytes:
            state.tracker = SpanTracker(hints.spans, self._token_bytes)
            state.tracker.push(output)

    def holds(self, row: int, rid: str) -> bool:
        """Whether `row` is the state of request `rid`."""
        state = self.states.get(row)
        return state is not None and state.rid == rid

    def state(self, row: int, rid: str) -> RequestState:
        """The state of request `rid` in `row`; a throwaway state if the request has ended."""
        return self.states[row] if self.holds(row, rid) else RequestState(rid, row=row)

    def keeps(self, state: RequestState) -> bool:
        """Whether the request of `state` still runs: it has not ended, nor been retracted and begun again."""
        return self.states.get(state.row) is state

    def route(self, rows: Sequence[int], forecasts: Sequence[Forecasts]) -> list[str]:
        """One arm per request."""
        return route(self.policy, [self.states[row] for row in rows], forecasts, self.costs)

    def may_name(self, row: int, arm: str) -> bool:
        """Whether the next round of the request in `row` may be routed to `arm`; others need not be asked."""
        state, candidates = self.states[row], self.policy.candidates
        if state.hints.off:
            return False
        if candidates is None or arm in candidates:
            return True
        span = state.span
        return span is not None and span.pin and span.prefer == arm

    def may_join(self, row: int) -> bool:
        """Whether the drafts of the request in `row` may be prolonged by another arm than the one it was routed to."""
        return self.policy.joins_arms and self.states[row].decision.reason != "pin"

    def takes(self, row: int, route: str, arm: str) -> bool:
        """Whether what `arm` says of the request in `row` may take the place of what `route` drafts for it."""
        if self.states[row].decision.reason == "off" or not self.may_name(row, arm):
            return False
        return route == arm or (self.policy.prices_batches and self.may_join(row))

    @property
    def copies_anyway(self) -> bool:
        """Whether a copy may take the place of any drafts, so that the device makes one whatever was promised."""
        return self.policy.prices_batches and self.policy.joins_arms

    def worth(self, arm: str) -> Worth:
        """The value that a further draft of `arm` must have; policies that price nothing draft the full length."""
        return self.costs.worth(arm) if self.policy.prices_batches else FULL_LENGTH

    def committed(
        self,
        state: RequestState,
        decision: Decision,
        arm: str,
        tokens: Sequence[int],
        width: int,
        start: int = 0,
        lengths: Mapping[str, int] | None = None,
    ) -> bool:
        """A round of `arm` committed `tokens` of the request in `state`, the bonus token last.

        Args:
            decision: what the round was decided on, which the state's next rounds may have left behind.
            width: rows that it verified. start: n when it began. lengths: tokens that each arm which drafted would have
                committed alone; None: `arm` committed these.

        Returns whether the round is evidence for other requests too (`Decision.free`).
        """
        lengths = {arm: len(tokens)} if lengths is None else lengths
        if decision.free:
            for own, length in lengths.items():
                self.policy.observe(own, decision.signals, length)
            self.costs.widened(arm, width)
        state.committed(arm, tokens, width - 1, start=start, reason=decision.reason, lengths=lengths)
        return decision.free

    def forget(self, row: int) -> None:
        """The request in `row` is gone."""
        self.states.pop(row, None)


def route(
    policy: Policy,
    states: Sequence[RequestState],
    forecasts: Sequence[Forecasts],
    costs: Costs | None,
) -> list[str]:
    """One arm per request; every state records its own. costs: None where nothing costs."""
    scores = [state.score(policy, forecast) for state, forecast in zip(states, forecasts, strict=True)]
    scores = [_ordered(state, own, costs) for state, own in zip(states, scores, strict=True)]
    free = [state.decision.signals if state.decision.free else None for state in states]
    for index, arm in policy.probe(free, costs.timings if costs else lambda _: PROBE_ROUNDS).items():
        scores[index] = {arm: scores[index][arm]}
    if policy.prices_batches:
        told = [state.decision.signals.expected for state in states]
        routes = assign(scores, costs, [state.previous for state in states], Dwell(), told)
    else:
        routes = assign(scores)
    for state, arm, own in zip(states, routes, scores, strict=True):
        state.chose(arm, own.get(arm, 1.0))
    return routes


def _ordered(state: RequestState, scores: Scores, costs: Costs | None) -> Scores:
    """The scores; of a request with a bias, its choice alone at what the policy expects of it.

    A bias is worth what its caller says to that request only. Weighed against the tokens of others, sixteen tokens a
    round that nobody gets would make their drafts look dear.
    """
    span = state.decision.signals.span
    if state.decision.free or span is None or state.decision.reason != "span":
        return scores
    (arm,) = assign([scores], costs, [state.previous], Dwell(), [state.decision.signals.expected])
    return {arm: max(scores[arm] - dict(span.bias).get(arm, 0.0), 1.0)}

"""Routes for a batch, from what every request's state knows and what the batch costs. Imports no SGLang."""

import math
from collections.abc import Mapping, Sequence

from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import PLAIN, Forecast
from whiflash_sglang.prices.costs import FULL_LENGTH, PROBE_ROUNDS, Costs, WorkerCosts, Worth
from whiflash_sglang.records.request import RequestState
from whiflash_sglang.records.signals import Signals
from whiflash_sglang.routing.assign import MARGIN, assign
from whiflash_sglang.routing.policies import Policy, Scores, apply_hints
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.tracker import SpanTracker
from whiflash_sglang.telemetry.trace import Recording

Forecasts = Mapping[str, Forecast | None]
"""Arms that may draft for a request, with what those expect of the round that look before they draft."""


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
        *,
        adapter: str | None = None,
    ) -> None:
        """A request begins in `row`, with the `output` it had before a retraction, and its trace if it has one.

        adapter: as of `Signals`.
        """
        state = self.states[row] = RequestState(rid, hints, row, recording=recording, adapter=adapter)
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
        """One pass per request, or none."""
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
        """Whether drafts of the request in `row` may be prolonged by other arms."""
        return self.states[row].decision.only is None

    def may_use(self, row: int, arm: str) -> bool:
        """Whether candidates of `arm` for the request in `row` may be verified."""
        return self.states[row].decision.only in (None, arm) and self.may_name(row, arm)

    def worth(self, arm: str) -> Worth:
        """The value that a further draft of `arm` must have; policies that price nothing draft the full length."""
        return self.costs.worth(arm) if self.policy.prices_batches else FULL_LENGTH

    def committed(
        self,
        state: RequestState,
        decision: Signals,
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

        Returns whether the round is evidence for other requests too (`Signals.free`).
        """
        lengths = {arm: len(tokens)} if lengths is None else lengths
        if decision.free:
            for each, length in lengths.items():
                self.policy.observe(each, decision, length)
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
    """One pass per request, or none; every state records its own. costs: None where nothing costs."""
    previous = [state.decision.keeps for state in states]
    scores, sources, promised, teachers = [], [], [], []
    for state, forecast, kept in zip(states, forecasts, previous, strict=True):
        scored = _scored(state, policy, forecast)
        signals = state.decision
        scored, source = _of_passes(scored, signals.expected, priced=policy.prices_batches)
        promised.append(signals.expected.get(source, PLAIN))
        if signals.reason == "span" and not signals.free:
            scored = _ordered(signals, scored, source, costs, kept, promised[-1])
        scores.append(scored)
        sources.append(source)
        teachers.append(signals if signals.free else None)
    probes = policy.probe(teachers, costs.timings if costs else lambda _: PROBE_ROUNDS)
    for index, arm in probes.items():
        scores[index] = {arm: scores[index][arm]}
    chosen = assign(scores, costs, previous, MARGIN, promised) if policy.prices_batches else assign(scores)
    routes = [arms.NONE if arm == arms.PROMISED else arm for arm in chosen]
    for index, (state, arm, source) in enumerate(zip(states, chosen, sources, strict=True)):
        decision = state.decision
        decision.only = _usable(policy, decision, arm, source)
        decision.promised, decision.keeps = arm == arms.PROMISED, None if index in probes else arm
        state.chose(routes[index])
    return routes


def _of_passes(scores: Scores, expected: Mapping[str, Forecast], *, priced: bool) -> tuple[Scores, str]:
    """Scores of the passes, and of the best of all that needs none; and which that is.

    priced: plain decoding stays beside it, since its rows may not pay; else it takes the place.
    """
    best, top = arms.NONE, scores.get(arms.NONE, -math.inf)
    for arm in expected:
        if arm in scores and scores[arm] >= top:
            best, top = arm, scores[arm]
    left = {arm: score for arm, score in scores.items() if arm not in expected} if expected else scores
    if best == arms.NONE:
        return left, best
    plain = {arms.NONE: left[arms.NONE]} if priced and arms.NONE in left else {}
    passes = {arm: score for arm, score in left.items() if arm != arms.NONE}
    return {**passes, arms.PROMISED: top, **plain}, best


def _usable(policy: Policy, signals: Signals, chosen: str, source: str) -> str | None:
    """`Signals.only` of the round. source: of what needs no pass, as of `_of_passes`."""
    only: str | None = source if chosen == arms.PROMISED else arms.NONE
    # If rows are dear, a device that knows more of the text than the host weighs what is promised again.
    weighed = signals.free and policy.prices_batches
    wished = chosen == arms.NONE and signals.expected and not weighed
    if policy.joins_arms and signals.reason != "pin" and not wished:
        only = None
    return only


def _ordered(
    signals: Signals, scores: Scores, source: str, costs: Costs | None, kept: str | None, promised: Forecast
) -> Scores:
    """The choice of a request with a bias, at what the policy expects of it.

    A bias is worth what its caller says to that request only. Weighed against the tokens of others, sixteen tokens a
    round that nobody gets would make their drafts look dear.
    """
    (arm,) = assign([scores], costs, [kept], MARGIN, [promised])
    drafting, span = source if arm == arms.PROMISED else arm, signals.span
    bias = sum(added for biased, added in span.bias.items() if biased == drafting) if span else 0.0
    return {arm: max(scores[arm] - bias, 1.0)}


def _scored(state: RequestState, policy: Policy, forecast: Mapping[str, Forecast | None]) -> Scores:
    """The policy's scores with a request's hints applied; remembers what decided."""
    signals = state.signals(forecast)
    scores, reason = apply_hints(
        policy.score(signals),
        signals.span,
        signals.allowed,
        off=state.hints.off,
        measured=signals.recent if policy.prices_batches else None,
    )
    signals.reason, state.decision = reason, signals
    return scores

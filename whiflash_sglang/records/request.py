"""The controller's memory of one running request. Imports neither SGLang nor CUDA."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from whiflash_sdk.hints import Span

from whiflash_sglang.drafts.candidates import Forecast
from whiflash_sglang.drafts.rates import Mean
from whiflash_sglang.records.signals import Signals
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.tracker import SpanTracker
from whiflash_sglang.telemetry.tally import ArmCounts
from whiflash_sglang.telemetry.trace import Recording

RECENT_ROUNDS = 8.0
"""Rounds after which a request's own acceptance with an arm counts for little."""


@dataclass(slots=True)
class RequestState:
    """Host-side state of a request, from its prefill to its end. row: of the request table.

    entropy, delta, predicted, adapter: see `Signals`. recent_by_kind: `Signals.recent` per kind of span,
    None outside spans, since what an arm accepts in prose says little of tool calls. rounds, tried, last: see
    `Signals`. decision: signals of the newest round, with what was decided. under_way: rows, at most, of each round
    whose results are not known yet. recording: of a request that asked for its trace. counts: of its rounds, by the arm
    that drafted. begun: whether the span tracker has the token that the prefill sampled, which no round commits.
    """

    rid: str
    hints: RequestHints = field(default_factory=RequestHints)
    row: int = 0
    tracker: SpanTracker | None = None
    rounds: int = 0
    tried: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    previous: str | None = None
    dwell: int = 0
    entropy: float = math.nan
    delta: float = math.nan
    predicted: dict[str, float] = field(default_factory=dict)
    recent_by_kind: defaultdict[str | None, defaultdict[str, Mean]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(Mean))
    )
    decision: Signals = field(default_factory=Signals)
    under_way: list[int] = field(default_factory=list)
    recording: Recording | None = None
    counts: dict[str, ArmCounts] = field(default_factory=dict)
    adapter: str | None = None
    begun: bool = False

    @property
    def span(self) -> Span | None:
        """The innermost open span at the end of the committed text."""
        return None if self.tracker is None else self.tracker.span

    def signals(self, forecast: Mapping[str, Forecast | None]) -> Signals:
        """Signals for a policy; `forecast`: arms that may draft, with what they expect of the round or None."""
        span = self.span
        known = {arm: expected for arm, expected in forecast.items() if expected is not None}
        return Signals(
            allowed=frozenset(forecast),
            entropy=self.entropy,
            recent=self.recent_by_kind.get(span.kind if span else None, {}),
            expected=known,
            predicted=self.predicted,
            delta=self.delta,
            span=span,
            rounds=self.rounds,
            tried=self.tried,
            last=self.last,
            previous=self.previous,
            dwell=self.dwell,
            adapter=self.adapter,
        )

    def begin(self, answer: Callable[[int], Sequence[int]]) -> None:
        """Before a round: a marker may begin with the token that the prefill sampled.

        answer: output tokens from a number on, as far as they are known.
        """
        if self.tracker is None or self.begun:
            return
        sampled = answer(self.tracker.length)[:1]
        self.tracker.push(sampled)
        self.begun = bool(sampled)

    def chose(self, arm: str) -> None:
        """The controller routed the next round to `arm`."""
        if self.recording is not None:
            self.recording.begin()
        self.tried[arm] = self.tried.get(arm, 0) + 1
        self.last[arm] = self.rounds
        self.rounds += 1
        self.dwell = self.dwell + 1 if arm == self.previous else 1
        self.previous = arm

    def committed(
        self,
        arm: str,
        tokens: Sequence[int],
        proposed: int = 0,
        *,
        start: int = 0,
        reason: str = "score",
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        """A round of `arm` that drafted `proposed` tokens committed `tokens`, the bonus token last.

        start: n when it began. reason: of its decision. lengths: as of `Controller.committed`.
        """
        span = self.span
        kind = span.kind if span else None
        recent = self.recent_by_kind[kind]
        for each, length in (lengths or {arm: len(tokens)}).items():
            recent[each].add(length, RECENT_ROUNDS)
        if self.recording is not None:
            self.recording.add(start, arm, len(tokens), proposed=proposed, reason=reason, span=kind)
        if self.tracker is not None:
            self.begun = True  # what the prefill sampled can no longer go before these
            self.tracker.push(tokens)

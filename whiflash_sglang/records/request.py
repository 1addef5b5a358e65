"""A running request, as the host knows it. Imports neither SGLang nor CUDA."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from whiflash_sglang.copying.tenants import Tenant
from whiflash_sglang.drafts.candidates import Forecast
from whiflash_sglang.drafts.rates import RECENT_ROUNDS, Mean
from whiflash_sglang.records.signals import Decision, Signals
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.tracker import SpanTracker
from whiflash_sglang.telemetry.tally import ArmCounts
from whiflash_sglang.telemetry.trace import Recording


@dataclass(slots=True, eq=False)
class Request(Signals):
    """A request on the host, from its prefill to its end or its retraction. row: of the request table.

    From its body: hints. tenant: who sent it, None if unknown. prediction: tokens of the answer that its caller
    expects. grammar: its constraint (`structure.matchers.Grammar`). prompt: tokens of its text before the answer. read:
    returns these tokens as drafters may read them. Rounds do not call it, since there may be many. stops: tokens that
    end it. priority: a higher number is more urgent; 0 without priority scheduling.

    running: whether it is live: false after its end, and after a retraction, which begins a new one. kept: by arm, the
    state that an arm that reads texts holds for it until its end. recording: its trace, if it asked for one. counts: of
    its rounds, by the arm that drafted.

    For the quarantine: left_out: arms that it continues without. faults: by arm that drafted, its faulty drafts since
    its last sound one.

    begun: whether the span tracker has the token that the prefill sampled, which no round commits. recent_by_kind:
    `Signals.recent` per kind of span, None outside spans, since what an arm accepts in prose says little of tool calls.
    wanted: mean number of drafts before requests compete for rows, by `Plan.priced_as` (`Costs.wanted`).
    decision: of its newest round. under_way: by round without results yet, an upper bound of its rows. usual_rows: rows
    that its newest round is expected to verify. known: tokens of its text that compiled code has; 0: only the prompt's.
    """

    rid: str
    hints: RequestHints = field(default_factory=RequestHints)
    row: int = 0
    tenant: Tenant | None = None
    prediction: Sequence[int] | None = None
    grammar: Any = None
    prompt: int = 0
    read: Callable[[], Sequence[int]] = tuple
    stops: Sequence[int] = ()
    priority: int = 0
    running: bool = False
    kept: dict[str, Any] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    faults: dict[str, int] = field(default_factory=dict)
    recording: Recording | None = None
    counts: dict[str, ArmCounts] = field(default_factory=dict)
    tracker: SpanTracker | None = None
    begun: bool = False
    wanted: defaultdict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    recent_by_kind: defaultdict[str | None, defaultdict[str, Mean]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(Mean))
    )
    decision: Decision = field(default_factory=Decision)
    under_way: list[int] = field(default_factory=list)
    known: int = 0
    usual_rows: float = 1.0

    def may_verify(self, arm: str) -> bool:
        """Whether candidates of `arm` may be verified: the route does not restrict the round to another source."""
        return self.decision.only in (None, arm)

    @property
    def may_join(self) -> bool:
        """Whether other arms may continue its drafts: no hint restricts the round to one draft source."""
        return self.decision.only is None

    def follow(self, tracker: SpanTracker, tokens: Sequence[int]) -> None:
        """Advance the span tracker by `tokens` of its text, in which spans open and close."""
        tracker.push(tokens)
        self.tracker, self.span = tracker, tracker.span

    def foresee(self, forecast: Mapping[str, Forecast | None]) -> None:
        """Set the signals of the next decision. `forecast`: the arms that may draft, with their forecasts or None."""
        self.allowed = frozenset(forecast)
        self.expected = {arm: expected for arm, expected in forecast.items() if expected is not None}
        self.recent = self.recent_by_kind.get(self.span.kind if self.span else None, {})

    def begin(self, answer: Callable[[int], Sequence[int]]) -> None:
        """Give the span tracker, before a round, the token that the prefill sampled: a marker may begin with it.

        answer: returns the output tokens from a given number on, as far as the host knows them.
        """
        if self.tracker is None or self.begun:
            return
        sampled = answer(self.tracker.length)[:1]
        self.follow(self.tracker, sampled)
        self.begun = bool(sampled)

    def chose(self, arm: str) -> None:
        """Record that the controller routed the next round to `arm`."""
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
        lengths: Mapping[str, float] | None = None,
    ) -> None:
        """Record that a round of `arm`, which drafted `proposed` tokens, committed `tokens`, bonus token last.

        start: n when the round began. reason: its decision's. lengths: as in `Controller.committed`.
        """
        kind = self.span.kind if self.span else None
        recent = self.recent_by_kind[kind]
        for each, length in (lengths or {arm: len(tokens)}).items():
            recent[each].add(length, RECENT_ROUNDS)
        if self.recording is not None:
            self.recording.add(start, arm, len(tokens), proposed=proposed, reason=reason, span=kind)
        if self.tracker is not None:
            self.follow(self.tracker, tokens)

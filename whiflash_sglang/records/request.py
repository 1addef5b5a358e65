"""All that is known of one running request. Imports neither SGLang nor CUDA."""

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

    Asked, and read once: hints. tenant: who may share text with it. prediction: tokens of the answer that its caller
    expects. grammar: what constrains it (`structure.matchers.Grammar`). prompt: how many tokens its text has before the
    answer. read: returns these as drafters may read them; not in a round, for they may be many.

    running: whether it has not ended, nor been retracted and begun again. kept: what an arm that reads texts keeps of
    it, by arm, until its end. recording: of a request that asked for its trace. counts: of its rounds, by the arm that
    drafted.

    For the quarantine: caller: who sent it, None for all whose caller nobody knows. left_out: arms that go without it.
    sound: arms that drafted for it, and how often each had been quarantined. in_a_row: faulty drafts since the last
    sound one, by arm.

    begun: whether the span tracker has the token that the prefill sampled, which no round commits. recent_by_kind:
    `Signals.recent` per kind of span, None outside spans, since what an arm accepts in prose says little of tool calls.
    wanted: drafts that there were for it, by what its rounds were priced as (`Costs.wanted`).
    decision: of its newest round. under_way: rows, at most, of each round whose results are not known yet. usual_rows:
    that its newest round is expected to verify.
    """

    rid: str
    hints: RequestHints = field(default_factory=RequestHints)
    row: int = 0
    tenant: Tenant | None = None
    prediction: Sequence[int] | None = None
    grammar: Any = None
    prompt: int = 0
    read: Callable[[], Sequence[int]] = tuple
    running: bool = False
    kept: dict[str, Any] = field(default_factory=dict)
    caller: object = None
    left_out: set[str] = field(default_factory=set)
    sound: dict[str, int] = field(default_factory=dict)
    in_a_row: dict[str, int] = field(default_factory=dict)
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
    usual_rows: float = 1.0

    @property
    def may_join(self) -> bool:
        """Whether its drafts may be prolonged by other arms."""
        return self.decision.only is None

    def follow(self, tracker: SpanTracker, tokens: Sequence[int]) -> None:
        """Its text goes on with `tokens`, in which spans open and close."""
        tracker.push(tokens)
        self.tracker, self.span = tracker, tracker.span

    def foresee(self, forecast: Mapping[str, Forecast | None]) -> None:
        """A round is to be decided; `forecast`: arms that may draft, with what they expect of the round or None."""
        self.allowed = frozenset(forecast)
        self.expected = {arm: expected for arm, expected in forecast.items() if expected is not None}
        self.recent = self.recent_by_kind.get(self.span.kind if self.span else None, {})

    def begin(self, answer: Callable[[int], Sequence[int]]) -> None:
        """Before a round: a marker may begin with the token that the prefill sampled.

        answer: output tokens from a number on, as far as they are known.
        """
        if self.tracker is None or self.begun:
            return
        sampled = answer(self.tracker.length)[:1]
        self.follow(self.tracker, sampled)
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
        lengths: Mapping[str, float] | None = None,
    ) -> None:
        """A round of `arm` that drafted `proposed` tokens committed `tokens`, the bonus token last.

        start: n when it began. reason: of its decision. lengths: as of `Controller.committed`.
        """
        kind = self.span.kind if self.span else None
        recent = self.recent_by_kind[kind]
        for each, length in (lengths or {arm: len(tokens)}).items():
            recent[each].add(length, RECENT_ROUNDS)
        if self.recording is not None:
            self.recording.add(start, arm, len(tokens), proposed=proposed, reason=reason, span=kind)
        if self.tracker is not None:
            self.begun = True  # what the prefill sampled can no longer go before these
            self.follow(self.tracker, tokens)

"""What the controller remembers of one running request."""

import math
from dataclasses import dataclass, field

from whiflash_sglang.routing.signals import OpenSpan, Signals

RECENT_WEIGHT = 0.3
"""Weight of the newest round in the running mean of a request's acceptance length per arm."""


@dataclass(frozen=True, slots=True)
class RoundTrace:
    """One round of a request: its arm, the tokens it committed (bonus included), why it was routed there."""

    arm: str
    committed: int
    reason: str
    span: str | None = None


@dataclass(slots=True)
class Lane:
    """Host-side state of a request, from its prefill to its end."""

    rid: str
    previous: str | None = None
    dwell: int = 0
    entropy: float = math.nan
    top1: float = math.nan
    margin: float = math.nan
    delta: float = math.nan
    expected: dict[str, float] = field(default_factory=dict)
    recent: dict[str, float] = field(default_factory=dict)
    span: OpenSpan | None = None
    rounds: list[RoundTrace] = field(default_factory=list)

    def signals(self, length: int, allowed: frozenset[str], match: int = 0) -> Signals:
        return Signals(
            length=length,
            allowed=allowed,
            entropy=self.entropy,
            top1=self.top1,
            margin=self.margin,
            recent=self.recent,
            expected=self.expected,
            delta=self.delta,
            match=match,
            span=self.span,
            previous=self.previous,
            dwell=self.dwell,
        )

    def chose(self, arm: str) -> None:
        """The controller routed the next round to `arm`."""
        self.dwell = self.dwell + 1 if arm == self.previous else 1
        self.previous = arm

    def committed(self, arm: str, tokens: int, reason: str) -> None:
        """A round of `arm` committed `tokens`, bonus included."""
        before = self.recent.get(arm, float(tokens))
        self.recent[arm] = before + RECENT_WEIGHT * (tokens - before)
        self.rounds.append(RoundTrace(arm, tokens, reason, self.span.kind if self.span else None))

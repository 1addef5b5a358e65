"""The signals of a request that a policy reads, and the decision that it makes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from whiflash_sdk.hints import Span

from whiflash_sglang.drafts.candidates import Forecast
from whiflash_sglang.drafts.rates import Mean


@dataclass(slots=True, eq=False)
class Decision:
    """The routing decision for one round of a request, kept while later rounds change the request's `Signals`.

    It was made from entropy, span, expected, predicted, tried, recent and adapter, as in `Signals`; tried and recent
    are not copied, so they change later.

    reason: why it was routed as it was (`apply_hints`). only: the one draft source whose candidates may be verified, or
        `none`; None: all. promised: whether a round without a pass is expected to verify a candidate. keeps: the choice
        that the next round's margin favours; None after a probe and at first. limit: most drafts of its pass, or 0.
    """

    entropy: float = math.nan
    span: Span | None = None
    expected: Mapping[str, Forecast] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    tried: Mapping[str, int] = field(default_factory=dict)
    recent: Mapping[str, Mean] = field(default_factory=dict)
    adapter: str | None = None
    reason: str = "score"
    only: str | None = None
    promised: bool = False
    keeps: str | None = None
    limit: int = 0

    @property
    def free(self) -> bool:
        """Whether the request's caller left this round to the policy: nothing is off, pinned or biased.

        Only such a round may be a probe, and only such a round is evidence for other requests: a caller may order
        drafts where no policy would make them, and as often as it likes. A preference is no order: it weighs as one
        round of the request.
        """
        return self.reason not in ("pin", "off") and not (self.span and any(self.span.bias.values()))


@dataclass(slots=True, eq=False, kw_only=True)
class Signals:
    """The signals of a request's next round, which a policy reads. Host-side ones may lag a round (overlap scheduling).

    allowed: arms that may draft for this request.
    entropy: nats, of the target's raw distribution (before temperature, penalties and masks) at the last verified
        position, up to seven rounds old while nothing is drafted; NaN when it was not measured.
    recent: arm → decayed mean of the request's own acceptance lengths (bonus token included) with that arm, in spans of
        the open span's kind, or outside spans.
    expected: forecasts of the arms that propose before the decision. predicted: arm → acceptance length, if a router's
        heads predict it.
    delta: the router's ΔAL = AL(EAGLE-3) − AL(DFlash), NaN without one.
    span: the innermost open span at the end of the committed text.
    rounds: how many the request has begun. tried: arm → those of them that it was routed to. last: arm → number of the
        last one of them; arms that it was never routed to are absent.
    previous: the last round's route, `none` if it copied, None before the first. dwell: its rounds in a row.
    adapter: id of the target's adapter (LoRA) that writes its text; None: the target itself does.
    """

    allowed: frozenset[str] = frozenset()
    entropy: float = math.nan
    recent: Mapping[str, Mean] = field(default_factory=dict)
    expected: Mapping[str, Forecast] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    delta: float = math.nan
    span: Span | None = None
    rounds: int = 0
    tried: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    previous: str | None = None
    dwell: int = 0
    adapter: str | None = None

    @property
    def unforeseen(self) -> frozenset[str]:
        """Return the allowed arms that have no forecast of the next round."""
        return self.allowed.difference(self.expected) if self.expected else self.allowed

    def without(self, arm: str) -> float:
        """Return the rounds that the request has begun since it was last routed to `arm`; infinite if it never was."""
        return self.rounds - self.last[arm] if arm in self.last else math.inf

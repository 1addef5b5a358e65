"""The paper's neural router as a policy, and what a router's predictions are to a request. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from whiflash_sglang.drafts import arms
from whiflash_sglang.records.request import Request
from whiflash_sglang.records.signals import Signals
from whiflash_sglang.routing.policies import Blind, Scores, order_pair


@dataclass(frozen=True, slots=True)
class NeuralPolicy(Blind):
    """EAGLE-3 where the predicted ΔAL = AL(EAGLE-3) - AL(DFlash) exceeds a threshold, else DFlash (arXiv 2606.07710).

    threshold: tokens. min_dwell: rounds an arm is kept before the next switch. A request's first round comes before
    any prediction; there ΔAL counts as 0.
    """

    threshold: float
    min_dwell: int = 1
    name: str = "neural"
    needs: frozenset[str] = field(default=frozenset({"delta"}))

    def score(self, signals: Signals) -> Scores:
        delta = 0.0 if math.isnan(signals.delta) else signals.delta
        return order_pair(signals, ar_first=delta > self.threshold, min_dwell=self.min_dwell)


def note(request: Request, outputs: Sequence[float]) -> None:
    """Keep a router's outputs for a request's next round: ΔAL, and the accepted drafts of `arms.PAIR` from its heads.

    A router without heads leaves `Request.predicted` empty.
    """
    delta, *accepted = outputs
    request.delta = delta
    request.predicted = {
        arm: 1.0 + max(drafts, 0.0) for arm, drafts in zip(arms.PAIR, accepted, strict=False)
    }

"""The paper's neural router as a policy, and `note`, which stores a router's outputs as signals. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from whiflash_sglang.drafts import arms
from whiflash_sglang.records.request import Request
from whiflash_sglang.records.signals import Signals
from whiflash_sglang.routing.policies import Policy, Scores, order_pair


@dataclass(frozen=True, slots=True)
class NeuralPolicy(Policy):
    """Chooses EAGLE-3 if the predicted ΔAL = AL(EAGLE-3) - AL(DFlash) exceeds a threshold, else DFlash (arXiv
    2606.07710).

    threshold: tokens. min_dwell: rounds that an arm is used before the next switch. Before a request's first round
    there is no prediction, and ΔAL counts as 0.
    """

    threshold: float
    min_dwell: int = 1
    name: str = "neural"
    needs: frozenset[str] = field(default=frozenset({"delta"}))

    def score(self, signals: Signals) -> Scores:
        delta = 0.0 if math.isnan(signals.delta) else signals.delta
        return order_pair(signals, ar_first=delta > self.threshold, min_dwell=self.min_dwell)


def note(request: Request, outputs: Sequence[float]) -> None:
    """Store a router's outputs as signals of the request's next round.

    outputs: ΔAL, then the predicted accepted drafts of `arms.PAIR`. Without heads only ΔAL, and `predicted` is empty.
    """
    delta, *accepted = outputs
    request.delta = delta
    request.predicted = {arm: 1.0 + max(drafts, 0.0) for arm, drafts in zip(arms.PAIR, accepted, strict=False)}

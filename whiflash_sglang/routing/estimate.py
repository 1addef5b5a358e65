"""Expected acceptance per arm without training: running means, by context, shared by all requests.

A context is the target's entropy at the last verified position, where it is computed, and the kind of the open
span. A request's own recent rounds outweigh the shared means the more of them there are.
"""

import math
from bisect import bisect_right

from whiflash_sglang.routing.mean import Mean
from whiflash_sglang.routing.signals import Signals

ENTROPY_EDGES = (0.05, 0.5, 1.5, 3.0)
"""Nats that separate the entropy bins."""

PRIOR_LENGTH = 2.0
PRIOR_WEIGHT = 2.0
"""An arm nobody has seen is believed to accept this much, for this many rounds."""

SHARED_WEIGHT = 3.0
"""Rounds of its own after which a request believes itself as much as the shared mean."""

PREDICTED_WEIGHT = 24.0
"""The same for a router's prediction, which knows the very position: recent rounds correct its level only."""

MEMORY = 400.0
"""Rounds after which an old observation of a context counts for little."""


Context = tuple[int, str | None]


def context_of(signals: Signals) -> Context:
    """Entropy bin (-1 when unknown) and kind of the open span."""
    entropy = -1 if math.isnan(signals.entropy) else bisect_right(ENTROPY_EDGES, signals.entropy)
    return entropy, signals.span.kind if signals.span else None


class AcceptanceEstimator:
    """Mean acceptance length (bonus token included) per arm, per arm and context, with a weak prior."""

    def __init__(self) -> None:
        self._by_arm: dict[str, Mean] = {}
        self._by_context: dict[tuple[str, Context], Mean] = {}

    def observe(self, arm: str, context: Context, length: int) -> None:
        """A round of `arm` that began in `context` committed `length` tokens."""
        self._by_arm.setdefault(arm, Mean()).add(length, MEMORY)
        self._by_context.setdefault((arm, context), Mean()).add(length, MEMORY)

    def rounds(self, arm: str) -> float:
        """Decayed number of rounds seen of `arm`."""
        mean = self._by_arm.get(arm)
        return mean.weight if mean else 0.0

    def expect(self, arm: str, signals: Signals) -> float:
        """Expected acceptance length of the request's next round with `arm`."""
        overall = self._shrunk(self._by_arm.get(arm), PRIOR_LENGTH, PRIOR_WEIGHT)
        shared = self._shrunk(self._by_context.get((arm, context_of(signals))), overall, 4.0)
        believed, weight = shared, SHARED_WEIGHT
        if arm in signals.predicted:
            believed, weight = signals.predicted[arm], PREDICTED_WEIGHT
        recent = signals.recent.get(arm)
        if recent is None:
            return believed
        return (believed * weight + recent.total) / (weight + recent.weight)

    @staticmethod
    def _shrunk(mean: Mean | None, towards: float, weight: float) -> float:
        if mean is None:
            return towards
        return (mean.total + towards * weight) / (mean.weight + weight)

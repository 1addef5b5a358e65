"""Estimates the acceptance length of each arm, from running means that all requests share or from a router's heads.

The means are kept per context: the entropy of the target at the last verified position, if it is computed, and the kind
of the open span. A router's predictions are scaled to the acceptance that is seen. The more recent rounds a request has
of its own, the more these outweigh the shared means.

A round teaches the shared means if its request's caller left the route to the policy (`Decision.free`). Later rounds of
one request count ever less (`REQUEST_ROUNDS`), so that a request that never ends does not decide for all.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from whiflash_sglang.drafts.rates import Mean
from whiflash_sglang.records.signals import Decision, Signals

ENTROPY_EDGES = (0.05, 0.5, 1.5, 3.0)
"""Edges of the entropy bins, in nats."""

PRIOR_LENGTH = 2.0
PRIOR_WEIGHT = 2.0
"""Acceptance length assumed for an arm without rounds, and the number of rounds that the assumption counts as."""

SHARED_WEIGHT = 3.0
"""Number of a request's own rounds that weigh as much as the shared mean."""

PREDICTED_WEIGHT = 24.0
"""Number of a request's own rounds that weigh as much as a router's prediction, which is made for each position."""

MEMORY = 400.0
"""Rounds after which an old observation of a context counts for little."""

REQUEST_ROUNDS = 64
"""Rounds of an arm that a request teaches with full weight. Its n-th round after that has the weight of this over n, so
10,000 rounds of one request count as 390."""

LEVEL_MEMORY = 100.0
"""Rounds after which an old ratio of accepted to predicted drafts (the router's level) counts for little. It is short
because drafts are cut shorter as soon as the server is busier."""

LEVEL_PRIOR = 20.0
"""Number of predicted drafts that the assumption of a level of 1 counts as."""

LEVEL_LIMIT = 2.0
"""Largest level. Copies after drafts count as accepted, and may be many times as long as the prediction."""

TRUST_PRIOR, TRUST_MEMORY = 40.0, 1000.0
"""Rounds that the prior trust in requests' own means counts as; rounds after which old evidence counts little."""

MEASURED_WEIGHT = 12.0
"""Number of rounds that an acceptance length measured with the bundle counts as."""

Place = tuple[int, str | None]
"""Context of a mean: entropy bin (-1 if the entropy is unknown) and kind of the open span."""


def place_of(signals: Signals | Decision) -> Place:
    """Return the context whose means apply to a round: its entropy bin and span kind."""
    entropy, span = signals.entropy, signals.span
    # An entropy that was not measured is NaN, which does not equal itself.
    return bisect_right(ENTROPY_EDGES, entropy) if entropy == entropy else -1, span.kind if span else None


class AcceptanceByPlace:
    """Learns, per arm and place in the pass, the chance that a draft is accepted if all drafts before it were.

    All requests share it. measured: by arm, chances that were measured with the bundle, the prior of each place; the
    last one counts for all later places. For an arm without them the prior is the chance of the place before.
    """

    def __init__(self, measured: Mapping[str, Sequence[float]]) -> None:
        self._measured = measured
        self._right: defaultdict[str, list[Mean]] = defaultdict(list)
        self._chances: dict[str, list[float]] = {}
        """Chances by arm and place, computed once until the arm's next round."""

    def observe(self, arm: str, drafts: int, right: int) -> None:
        """Learn that the first `right` of `drafts` drafts of a pass were accepted and the next one was not."""
        means = self._right[arm]
        if drafts > len(means):
            means += [Mean() for _ in range(drafts - len(means))]
        for place, mean in enumerate(means[: min(right + 1, drafts)]):
            mean.add(place < right, MEMORY)
        self._chances.pop(arm, None)

    def accepted(self, arm: str, drafts: float, after: int = 0) -> float:
        """Return the mean number of accepted drafts in places [after, drafts), given that all drafts before were."""
        known = self._chances.get(arm)
        if known is None or len(known) < drafts:
            known = self._chances[arm] = self._expected(arm, math.ceil(drafts))
        whole, accepted, alive = int(drafts), 0.0, 1.0
        for chance in known[after:whole]:
            alive *= chance
            accepted += alive
        return accepted + (drafts - whole) * alive * known[whole] if drafts > whole else accepted

    def _expected(self, arm: str, drafts: int) -> list[float]:
        measured, chances, chance = self._measured.get(arm, ()), list[float](), 1 / PRIOR_LENGTH
        seen = self._right[arm]
        for place in range(max(drafts, len(seen))):
            weight = PRIOR_WEIGHT
            if measured:
                chance, weight = measured[min(place, len(measured) - 1)], MEASURED_WEIGHT
            chance = seen[place].shrunk(chance, weight) if place < len(seen) else chance
            chances.append(chance)
        return chances


@dataclass(slots=True)
class _Shown:
    """Means over the rounds of one arm.

    lengths, by_place: acceptance lengths, in all contexts and by context. accepted, predicted: accepted drafts, and
    drafts that the router predicted. agreed, squares: means of x · y and of x², for a regression; x is how far the
    request's own rounds would move the shared estimate, y how far the round was off it.
    """

    lengths: Mean = field(default_factory=Mean)
    by_place: defaultdict[Place, Mean] = field(default_factory=lambda: defaultdict(Mean))
    accepted: Mean = field(default_factory=Mean)
    predicted: Mean = field(default_factory=Mean)
    agreed: Mean = field(default_factory=Mean)
    squares: Mean = field(default_factory=Mean)


class AcceptanceEstimator:
    """Estimates acceptance lengths (bonus token included) by arm and context, from means with a weak prior.

    base: for an adapter, the estimator of the target without adapters, whose means are the prior. measured: by arm, the
    acceptance length measured with the bundle.
    """

    def __init__(self, base: "AcceptanceEstimator | None" = None, measured: Mapping[str, float] | None = None) -> None:
        self._base, self._measured = base, measured or {}
        self._shown: defaultdict[str, _Shown] = defaultdict(_Shown)
        self._shared: dict[tuple[AcceptanceEstimator, str, Place], tuple[float, float, float]]
        self._shared = base._shared if base else {}
        """Cached by arm and place until the next round, for all adapters: length, its weight, and trust (`_trust`)."""

    def observe(self, arm: str, decision: Decision, length: float) -> None:
        """Learn that a round of `arm`, decided by `decision`, committed `length` tokens."""
        weight = min(REQUEST_ROUNDS / max(decision.tried.get(arm, 1), 1), 1.0)
        place, shown = place_of(decision), self._shown[arm]
        believed, moved = self._split(arm, decision, place)
        if moved:
            shown.agreed.add(moved * (length - believed), TRUST_MEMORY, weight)
            shown.squares.add(moved**2, TRUST_MEMORY, weight)
        self._shared.clear()
        shown.lengths.add(length, MEMORY, weight)
        shown.by_place[place].add(length, MEMORY, weight)
        if arm in decision.predicted:
            shown.accepted.add(length - 1, LEVEL_MEMORY, weight)
            shown.predicted.add(decision.predicted[arm] - 1, LEVEL_MEMORY, weight)

    def forget_asked(self) -> None:
        """Empty the cache that the target and its LoRA adapters share: its keys keep a dropped adapter in memory."""
        self._shared.clear()

    def rounds(self, arm: str) -> float:
        """Return the decayed number of rounds of `arm` that were learned."""
        return self._shown[arm].lengths.weight

    def usual(self, arm: str) -> float:
        """Return the mean acceptance length of `arm` over all contexts."""
        prior = self._base.usual(arm) if self._base else self._measured.get(arm, PRIOR_LENGTH)
        return self._shown[arm].lengths.shrunk(prior, self._weight(arm, PRIOR_WEIGHT))

    def _weight(self, arm: str, unknown: float) -> float:
        """Return how many rounds the prior of `arm` counts as: MEASURED_WEIGHT if it was measured, else `unknown`."""
        return MEASURED_WEIGHT if arm in self._measured else unknown

    def expect(self, arm: str, signals: Signals, place: Place | None = None) -> float:
        """Return the expected acceptance length of the request's next round with `arm`. place: its `place_of`."""
        place = place or place_of(signals)
        if arm in signals.predicted:
            believed, moved = self._split(arm, signals, place)
            return believed + moved * self._trust(arm) if moved else believed
        if (known := self._shared.get((self, arm, place))) is None:
            known = self._believed(arm, place), self._weight(arm, SHARED_WEIGHT), self._trust(arm)
            self._shared[self, arm, place] = known
        believed, weight, trust = known
        if (recent := signals.recent.get(arm)) is None:
            return believed
        return believed + (recent.total - believed * recent.weight) / (weight + recent.weight) * trust

    def _split(self, arm: str, known: Signals | Decision, place: Place) -> tuple[float, float]:
        """Return the shared estimate, and how far the request's own recent rounds would move it if fully trusted."""
        if arm in known.predicted:
            believed, weight = 1 + (known.predicted[arm] - 1) * self._level(arm), PREDICTED_WEIGHT
        else:
            weight, believed = self._weight(arm, SHARED_WEIGHT), self._believed(arm, place)
        if (recent := known.recent.get(arm)) is None:
            return believed, 0.0
        return believed, (recent.total - believed * recent.weight) / (weight + recent.weight)

    def _trust(self, arm: str) -> float:
        """Return the share (0 to 1) of requests' own deviations from the shared mean that later rounds confirmed."""
        agreed, squares = self._shown[arm].agreed, self._shown[arm].squares
        prior = TRUST_PRIOR * (squares.value if squares.weight else 1.0)
        trust = self._base._trust(arm) if self._base else 1.0
        return min(max((agreed.total + prior * trust) / (squares.total + prior), 0.0), 1.0)

    def _believed(self, arm: str, place: Place) -> float:
        """Return the shared mean acceptance length of `arm` in this context."""
        usual = self.usual(arm)
        if self._base:
            usual = max(self._base._believed(arm, place) + usual - self._base.usual(arm), 1.0)
        return self._shown[arm].by_place[place].shrunk(usual, self._weight(arm, 4.0))

    def _level(self, arm: str) -> float:
        """Return accepted over predicted drafts, which scales predictions: the router saw full passes on other text."""
        shown = self._shown[arm]
        prior = LEVEL_PRIOR * (self._base._level(arm) if self._base else 1.0)
        return min((shown.accepted.total + prior) / (shown.predicted.total + LEVEL_PRIOR), LEVEL_LIMIT)

"""Expected acceptance per arm: running means, by context, shared by all requests, or a router's predictions at the
level of what is accepted.

A context is the target's entropy at the last verified position, where it is computed, and the kind of the open
span. A request's own recent rounds outweigh the shared means the more of them there are.

Rounds teach the shared means if the request's caller left the route to the policy (`Decision.free`). A request's later
rounds with an arm count ever less (`REQUEST_ROUNDS`), so that one that never ends does not decide for all.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from whiflash_sglang.drafts.rates import Mean
from whiflash_sglang.records.signals import Decision, Signals

ENTROPY_EDGES = (0.05, 0.5, 1.5, 3.0)
"""Nats that separate the entropy bins."""

PRIOR_LENGTH = 2.0
PRIOR_WEIGHT = 2.0
"""An arm nobody has seen is believed to accept this much, for this many rounds."""

SHARED_WEIGHT = 3.0
"""Rounds of its own after which a request believes itself as much as the shared mean."""

PREDICTED_WEIGHT = 24.0
"""The same for a router's prediction, which knows the very position."""

MEMORY = 400.0
"""Rounds after which an old observation of a context counts for little."""

REQUEST_ROUNDS = 64
"""Rounds of an arm that a request teaches in full. Its n-th one beyond counts as so many over n: a request of 10,000
rounds counts as one of 390."""

LEVEL_MEMORY = 100.0
"""The same for what a router's predictions are worth: drafts are cut shorter as soon as the server is busier."""

LEVEL_PRIOR = 20.0
"""Predicted accepted drafts for which a router is believed as it is."""

LEVEL_LIMIT = 2.0
"""No level is higher: copies behind drafts may be many times as long as what is predicted."""

TRUST_PRIOR, TRUST_MEMORY = 40.0, 1000.0
"""Rounds for which requests' own rounds are believed to say what they seem to; after which it counts for little."""

MEASURED_WEIGHT = 12.0
"""Rounds for which acceptance that was measured with the bundle is believed."""

Place = tuple[int, str | None]
"""Entropy bin, -1 if it is unknown, and kind of the open span."""


def place_of(signals: Signals | Decision) -> Place:
    """The place of its means."""
    entropy, span = signals.entropy, signals.span
    # NaN where it was not measured, which is no number's equal.
    return bisect_right(ENTROPY_EDGES, entropy) if entropy == entropy else -1, span.kind if span else None


class AcceptanceByPlace:
    """Chances that a draft of an arm is right if those before it were, by its place in the pass, of all requests.

    measured: arm → chances of its places where nothing was seen, the last one's of all places after it. An arm without
    them, and a place without drafts, is taken for as good as the place before it.
    """

    def __init__(self, measured: Mapping[str, Sequence[float]]) -> None:
        self._measured = measured
        self._right: defaultdict[str, list[Mean]] = defaultdict(list)
        self._chances: dict[str, list[float]] = {}
        """By arm, until the next round is seen."""

    def observe(self, arm: str, drafts: int, right: int) -> None:
        """The first `right` of `drafts` drafts were right, and the next one was not."""
        means = self._right[arm]
        means += [Mean() for _ in range(drafts - len(means))]
        for place, mean in enumerate(means[: min(right + 1, drafts)]):
            mean.add(place < right, MEMORY)
        self._chances.pop(arm, None)

    def accepted(self, arm: str, drafts: float, after: int = 0) -> float:
        """Return how many drafts of places `after` to `drafts` are accepted on average if all before `after` were."""
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
    """Rounds of one arm, as means.

    lengths, by_place: acceptance lengths. accepted, predicted: drafts that were, and those that the router predicted.
    agreed, squares: how far own rounds moved what is expected: times how far the next one was off, and squared.
    """

    lengths: Mean = field(default_factory=Mean)
    by_place: defaultdict[Place, Mean] = field(default_factory=lambda: defaultdict(Mean))
    accepted: Mean = field(default_factory=Mean)
    predicted: Mean = field(default_factory=Mean)
    agreed: Mean = field(default_factory=Mean)
    squares: Mean = field(default_factory=Mean)


class AcceptanceEstimator:
    """Mean acceptance length (bonus token included) per arm, per arm and context, with a weak prior.

    base: means that take the prior's place, of the target whose adapter writes the text. measured: arm → acceptance
    length that was measured with the bundle.
    """

    def __init__(
        self, base: "AcceptanceEstimator | None" = None, measured: Mapping[str, float] | None = None
    ) -> None:
        self._base, self._measured = base, measured or {}
        self._shown: defaultdict[str, _Shown] = defaultdict(_Shown)
        self._shared: dict[tuple[AcceptanceEstimator, str, Place | None], float] = (
            base._shared if base else {}
        )
        """Lengths by arm and place, and trusts by arm, kept until the next round is seen; shared by all adapters."""

    def observe(self, arm: str, decision: Decision, length: float) -> None:
        """A round of `arm`, of this `decision`, committed `length` tokens."""
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
        """Drop computed means of all adapters, which keep the means of a dropped adapter alive."""
        self._shared.clear()

    def rounds(self, arm: str) -> float:
        """Decayed number of rounds seen of `arm`."""
        return self._shown[arm].lengths.weight

    def usual(self, arm: str) -> float:
        """Acceptance length of `arm` in all contexts together."""
        prior = self._base.usual(arm) if self._base else self._measured.get(arm, PRIOR_LENGTH)
        return self._shown[arm].lengths.shrunk(prior, self._weight(arm, PRIOR_WEIGHT))

    def _weight(self, arm: str, unknown: float) -> float:
        """Rounds that outweigh what is believed of all: more of them if that was measured, `unknown` if not."""
        return MEASURED_WEIGHT if arm in self._measured else unknown

    def expect(self, arm: str, signals: Signals, place: Place | None = None) -> float:
        """Expected acceptance length of the request's next round with `arm`. place: of `place_of`, if it is known."""
        believed, moved = self._split(arm, signals, place or place_of(signals))
        if not moved:
            return believed
        trust = self._shared.get((self, arm, None))
        if trust is None:
            trust = self._shared[self, arm, None] = self._trust(arm)
        return believed + moved * trust

    def _split(self, arm: str, known: Signals | Decision, place: Place) -> tuple[float, float]:
        """Expected of any request here; and how far its own rounds would move that, were they believed."""
        if arm in known.predicted:
            believed, weight = 1 + (known.predicted[arm] - 1) * self._level(arm), PREDICTED_WEIGHT
        else:
            weight, shared = self._weight(arm, SHARED_WEIGHT), self._shared.get((self, arm, place))
            believed = self._believed(arm, place) if shared is None else shared
        if (recent := known.recent.get(arm)) is None:
            return believed, 0.0
        return believed, (recent.total - believed * recent.weight) / (weight + recent.weight)

    def _trust(self, arm: str) -> float:
        """The share of that which later rounds agreed with: little where requests are alike and their luck differs."""
        agreed, squares = self._shown[arm].agreed, self._shown[arm].squares
        prior = TRUST_PRIOR * (squares.value if squares.weight else 1.0)
        trust = self._base._trust(arm) if self._base else 1.0
        return min(max((agreed.total + prior * trust) / (squares.total + prior), 0.0), 1.0)

    def _believed(self, arm: str, place: Place) -> float:
        """Acceptance length of `arm` in this place."""
        usual = self.usual(arm)
        if self._base:
            usual = max(self._base._believed(arm, place) + usual - self._base.usual(arm), 1.0)
        believed = self._shown[arm].by_place[place].shrunk(usual, self._weight(arm, 4.0))
        self._shared[self, arm, place] = believed
        return believed

    def _level(self, arm: str) -> float:
        """Accepted over predicted drafts: a router predicts drafts of full length, and text like its training's."""
        shown = self._shown[arm]
        prior = LEVEL_PRIOR * (self._base._level(arm) if self._base else 1.0)
        return min((shown.accepted.total + prior) / (shown.predicted.total + LEVEL_PRIOR), LEVEL_LIMIT)

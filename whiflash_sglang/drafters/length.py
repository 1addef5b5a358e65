"""Draft length by expectation: a draft goes on as long as one more token is expected to pay for itself.

A drafter's confidence in a token (its own top-1 probability) is calibrated while serving into the chance that the
target accepts it, given that it accepted everything before. The product of these chances along a draft is what one
more token is expected to bring; `Worth` says what it costs. Imports neither SGLang nor torch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from whiflash_sglang.routing.costs import Worth

EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
"""Top-1 probabilities that separate the bins of confidence."""

PRIOR_WEIGHT = 8.0
"""Tokens for which a bin is believed to be calibrated as it is: as often right as it is sure."""

DECAY = 0.998
"""Of earlier observations of a bin, at every new one."""


class Chances:
    """Chance of acceptance per bin of confidence: decayed counts with the confidence itself as the prior."""

    def __init__(self) -> None:
        bounds = (0.0, *EDGES, 1.0)
        centres = [(low + high) / 2 for low, high in pairwise(bounds)]
        self._right = [PRIOR_WEIGHT * centre for centre in centres]
        self._seen = [PRIOR_WEIGHT] * len(centres)

    def of(self, confidence: float) -> float:
        """Chance that a draft of this `confidence` is accepted, given that all before it were."""
        i = bisect_right(EDGES, confidence)
        return self._right[i] / self._seen[i]

    @property
    def mean(self) -> float:
        """Chance of a draft whose confidence is not known yet."""
        return sum(self._right) / sum(self._seen)

    def observe(self, confidence: float, accepted: bool) -> None:
        """A draft of this `confidence`, with everything before it accepted, was `accepted` or not."""
        i = bisect_right(EDGES, confidence)
        self._right[i] = self._right[i] * DECAY + accepted
        self._seen[i] = self._seen[i] * DECAY + 1.0


class DraftLength:
    """One drafter's chances, and the confidences of its last drafts per request row."""

    def __init__(self) -> None:
        self.chances = Chances()
        self._proposed: dict[int, list[float]] = {}

    def begin(self, row_ids: Sequence[int], limits: Sequence[int], worth: Worth) -> "Growing":
        """Start the drafts of one round: nothing proposed yet for the requests in `row_ids`."""
        growing = Growing(self.chances, limits, worth)
        self._proposed.update(zip(row_ids, growing.kept, strict=True))
        return growing

    def observe(self, row: int, proposed: int, accepted: int) -> None:
        """The first `accepted` of the `proposed` drafts of the last round were right, the next one was not."""
        for depth, confidence in enumerate(self._proposed.get(row, ())[: min(accepted + 1, proposed)]):
            self.chances.observe(confidence, depth < accepted)

    def release(self, row: int) -> None:
        """The request in `row` is gone."""
        self._proposed.pop(row, None)


class Growing:
    """Drafts of one round while they grow by one token per request at a time.

    kept: per request, the confidences of the tokens that are worth verifying; always the first, so that a drafter
    that was wrong for a while is not forgotten. alive: per request, the chance that all of them are accepted.
    """

    def __init__(self, chances: Chances, limits: Sequence[int], worth: Worth) -> None:
        self._chances, self._limits, self._worth = chances, limits, worth
        self._growing = list(range(len(limits)))
        self.alive = [1.0] * len(limits)
        self.kept: list[list[float]] = [[] for _ in limits]

    @property
    def counts(self) -> list[int]:
        """Drafts to verify, per request."""
        return [len(kept) for kept in self.kept]

    def extend(self, confidences: Sequence[float]) -> bool:
        """One more token was drafted for every request. Returns whether drafting yet another one pays."""
        growing, self._growing = self._growing, []
        for i in growing:
            alive = self.alive[i] * self._chances.of(confidences[i])
            if self.kept[i] and alive < self._worth.row:
                continue
            self.kept[i].append(confidences[i])
            self.alive[i] = alive
            if len(self.kept[i]) < self._limits[i]:
                self._growing.append(i)
        gain = sum(self.alive[i] for i in self._growing) * self._chances.mean
        return bool(self._growing) and gain >= self._worth.draft + self._worth.row * len(self._growing)

"""Decayed means, and decayed chances with a prior, learned while serving. Imports no torch."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

RECENT_ROUNDS = 8.0
"""Rounds after which what a request's own drafts were counts for little."""


@dataclass(slots=True)
class Mean:
    """A decayed mean: `total / weight`."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, memory: float, weight: float = 1.0) -> None:
        """`value` counts `weight`; what came before counts 1/e less after `memory` values of weight 1."""
        keep = 1.0 - weight / memory
        self.total = self.total * keep + value * weight
        self.weight = self.weight * keep + weight

    @property
    def value(self) -> float:
        """The mean; at least one value must have been added."""
        return self.total / self.weight

    def shrunk(self, prior: float, weight: float) -> float:
        """The mean, as if `weight` values of `prior` had been added."""
        return (self.total + prior * weight) / (self.weight + weight)


class Rates:
    """Rates by kind, a number from 0: how often observations were right, begun as if their prior had been seen.

    Args:
        priors: chance of each kind before anything was observed. weight: observations that a prior counts for.
        decay: factor on earlier observations at every new one of the same kind.
    """

    def __init__(self, priors: Iterable[float], weight: float, decay: float) -> None:
        self._decay = decay
        self._right = array("d", (prior * weight for prior in priors))
        self._seen = array("d", [weight]) * len(self._right)

    def of(self, kind: int) -> float:
        """Chance of a kind."""
        return self._right[kind] / self._seen[kind]

    @property
    def addresses(self) -> tuple[int, int]:
        """Addresses of the observations of each kind that were right, and of all of them, as float64."""
        return self._right.buffer_info()[0], self._seen.buffer_info()[0]

    @property
    def all(self) -> list[float]:
        """Chance of every kind, in their order."""
        return [right / seen for right, seen in zip(self._right, self._seen, strict=True)]

    @property
    def mean(self) -> float:
        """Chance of any kind, each as often as it was observed."""
        return sum(self._right) / sum(self._seen)

    def observe(self, kind: int, right: bool) -> None:
        """Something of a kind was `right` or not."""
        self._right[kind] = self._right[kind] * self._decay + right
        self._seen[kind] = self._seen[kind] * self._decay + 1.0

"""Decayed means, and decayed chances with a prior, learned while serving. Imports no torch."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

RECENT_ROUNDS = 8.0
"""Rounds after which a result of a request's own drafts counts 1/e in its mean."""


@dataclass(slots=True)
class Mean:
    """A decayed mean: `total / weight`."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, memory: float, weight: float = 1.0) -> None:
        """Add `value` with `weight`. Earlier values decay to about 1/e over `memory` values of weight 1."""
        keep = 1.0 - weight / memory
        self.total = self.total * keep + value * weight
        self.weight = self.weight * keep + weight

    @property
    def value(self) -> float:
        """Return the mean; at least one value must have been added."""
        return self.total / self.weight

    def shrunk(self, prior: float, weight: float) -> float:
        """Return the mean as if `weight` values of `prior` had been added too."""
        return (self.total + prior * weight) / (self.weight + weight)


class Rates:
    """Decayed rates at which observations were right, one for each kind (0, 1, ...), each with a prior.

    Args:
        priors: chance of each kind before anything was observed. weight: observations that a prior counts for.
        decay: factor on earlier observations at every new one of the same kind.
    """

    def __init__(self, priors: Iterable[float], weight: float, decay: float) -> None:
        self._decay = decay
        self._right = array("d", (prior * weight for prior in priors))
        self._seen = array("d", [weight]) * len(self._right)

    def of(self, kind: int) -> float:
        """Return the chance that an observation of this kind is right."""
        return self._right[kind] / self._seen[kind]

    @property
    def addresses(self) -> tuple[int, int]:
        """Addresses of two float64 arrays over kinds, for native code: right observations, and all observations."""
        return self._right.buffer_info()[0], self._seen.buffer_info()[0]

    @property
    def all(self) -> list[float]:
        """Return the chance of every kind, in the order of kinds."""
        return [right / seen for right, seen in zip(self._right, self._seen, strict=True)]

    @property
    def mean(self) -> float:
        """Return the chance over all kinds, each weighted by its observations."""
        return sum(self._right) / sum(self._seen)

    def observe(self, kind: int, right: bool) -> None:
        """Count an observation of a kind, which was `right` or not."""
        self._right[kind] = self._right[kind] * self._decay + right
        self._seen[kind] = self._seen[kind] * self._decay + 1.0


def continuing(mean: float, most: int) -> float:
    """Return the chance r that one more draft is right, if rounds of at most `most` tokens commit `mean` on average.

    It solves 1 + r + … + r^(most-1) = `mean`.
    """
    low, high = 0.0, 1.0
    for _ in range(27):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(most)) < mean else (low, middle)
    return low

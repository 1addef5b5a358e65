"""A mean that forgets."""

from dataclasses import dataclass


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

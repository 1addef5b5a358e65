"""A mean that forgets."""

from dataclasses import dataclass


@dataclass(slots=True)
class Mean:
    """A decayed mean: `total / weight`."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, memory: float) -> None:
        keep = 1.0 - 1.0 / memory
        self.total = self.total * keep + value
        self.weight = self.weight * keep + 1.0

    @property
    def value(self) -> float:
        """The mean; at least one value must have been added."""
        return self.total / self.weight

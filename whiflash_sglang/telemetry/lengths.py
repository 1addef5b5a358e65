"""Tokens a round over requests, as sums that only grow: whoever reads them twice knows the time between.

Rounds of one request are alike, so requests are what is independent: the sums hold what an interval over them needs.
"""

from dataclasses import astuple, dataclass
from typing import Self


@dataclass(slots=True)
class Lengths:
    """Sums over requests that ended.

    requests: how many. tokens, rounds: of each, t and r. tokens_squared, rounds_squared, products: of t², r² and t · r.
    """

    requests: int = 0
    tokens: int = 0
    rounds: int = 0
    tokens_squared: int = 0
    rounds_squared: int = 0
    products: int = 0

    def add(self, tokens: int, rounds: int) -> None:
        """A request ended, for which `rounds` rounds committed `tokens`."""
        self.requests += 1
        self.tokens += tokens
        self.rounds += rounds
        self.tokens_squared += tokens * tokens
        self.rounds_squared += rounds * rounds
        self.products += tokens * rounds

    def since(self, earlier: Self) -> Self:
        """The requests that ended after `earlier` was read. Raises ValueError: the server began again since."""
        mine, theirs = astuple(self), astuple(earlier)
        if any(a < b for a, b in zip(mine, theirs, strict=True)):
            raise ValueError("the sums are smaller than before")
        return type(self)(*(a - b for a, b in zip(mine, theirs, strict=True)))

    @property
    def length(self) -> float:
        """Tokens a round; there must be one."""
        return self.tokens / self.rounds

    @property
    def variance(self) -> float:
        """Variance of the length's logarithm, by the delta method over requests, of which there must be two."""
        squares = self.tokens_squared - 2 * self.length * self.products + self.length**2 * self.rounds_squared
        return self.requests / (self.requests - 1) * max(squares, 0.0) / self.tokens**2

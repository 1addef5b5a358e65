"""Rounds of a replay: where they begin, what they emit, and their tally. Imports no torch."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq


@dataclass
class Tally:
    """Rounds, and the tokens that they emitted (the bonus token included).

    drafts: that were proposed, where a walk counts them. won: arm → rounds that it drafted, where there are several.
    """

    rounds: float = 0
    tokens: int = 0
    drafts: float = 0
    won: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, other: "Tally") -> None:
        """Count another's rounds here too."""
        self.rounds += other.rounds
        self.tokens += other.tokens
        self.drafts += other.drafts
        for arm, rounds in other.won.items():
            self.won[arm] += rounds

    @property
    def acceptance_length(self) -> float:
        """Tokens per round."""
        return self.tokens / self.rounds if self.rounds else float("nan")


def agreed(drafts: Iterable[int], text: Iterable[int]) -> int:
    """Drafts that are accepted: how many of the first equal the text."""
    return sum(takewhile(bool, map(eq, drafts, text)))


def rounds(begin: int, end: int, accepted: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Go through answer positions [begin, end): where each round begins, and how many tokens it emits.

    A round emits its accepted drafts and one token more, but never beyond `end`.

    Args:
        accepted: drafts that the round at a position accepts; asked once a round, after the round before was handled.
    """
    while begin < end:
        emitted = min(accepted(begin) + 1, end - begin)
        yield begin, emitted
        begin += emitted

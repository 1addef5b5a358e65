"""Rounds of a replay: where they begin, what they emit, and their tally; and where an answer begins to loop.

Small greedy models fall into repeated n-grams, which flatter acceptance. Imports no torch."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq


@dataclass
class RoundTally:
    """Rounds, and the tokens that they emitted (the bonus token included).

    won: arm → rounds that it drafted, where there are several.
    """

    rounds: int = 0
    tokens: int = 0
    won: dict[str, int] = field(default_factory=lambda: defaultdict(int))

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


MAX_PERIOD = 48
MIN_REPEATS = 4
MIN_SPAN = 24


def loop_start(tokens: Sequence[int]) -> int | None:
    """Index where the second repetition of the closing loop begins, or None where the end is no loop.

    A loop is a period of at most 48 tokens that fills the tail at least four times over and at least 24
    tokens. The first pass through the period is kept: it is ordinary text.
    """
    length = len(tokens)
    for period in range(1, min(MAX_PERIOD, length // MIN_REPEATS) + 1):
        if tokens[length - 1] != tokens[length - 1 - period]:
            continue
        start = length - period
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        span = length - start
        if span >= max(MIN_SPAN, MIN_REPEATS * period):
            return start + period
    return None

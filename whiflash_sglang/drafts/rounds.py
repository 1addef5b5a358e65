"""Step through and tally the rounds of a replay, and find where an answer begins to loop. Imports no torch.

Small greedy models fall into repeated n-grams, which raise acceptance and so flatter a drafter."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class RoundTally(NamedTuple):
    """Numbers of an answer's rounds and of the tokens that they emit (bonus tokens included)."""

    rounds: int
    tokens: int

    @classmethod
    def of(cls, accepted: Sequence[int]) -> "RoundTally":
        """Tally an answer that one drafter drafts. accepted: its accepted drafts at each position, as replayed."""
        emitted = [*rounds(accepted)]
        return cls(len(emitted), sum(emitted))


def acceptance_length(tallies: Sequence[RoundTally]) -> float:
    """Return the tokens per round of all these answers together."""
    return sum(one.tokens for one in tallies) / sum(one.rounds for one in tallies)


def rounds(accepted: Sequence[int]) -> Iterator[int]:
    """Yield how many tokens each round of an answer emits: its accepted drafts and one more, but none beyond the end.

    accepted: accepted drafts of a round that begins at each position of the answer.
    """
    begin = 0
    while begin < len(accepted):
        emitted = min(accepted[begin] + 1, len(accepted) - begin)
        yield emitted
        begin += emitted


MAX_PERIOD = 48
MIN_REPEATS = 4
MIN_SPAN = 24


def loop_start(tokens: Sequence[object]) -> int | None:
    """Return the index where the closing loop's second repetition begins; None if the text does not end in a loop.

    A loop repeats a period of at most 48 tokens at least four times, over at least 24 tokens at the text's end.
    The first pass through the period counts as ordinary text.
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

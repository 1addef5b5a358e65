"""Step through and tally the rounds of a replay, and find where an answer begins to loop. Imports no torch.

Small greedy models fall into repeated n-grams, which raise acceptance and so flatter a drafter."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq


@dataclass
class RoundTally:
    """Counts rounds and their emitted tokens (bonus tokens included)."""

    rounds: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, accepted: Sequence[int]) -> "RoundTally":
        """Tally an answer that one drafter drafts. accepted: its accepted drafts at each position, as replayed."""
        emitted = [tokens for _, tokens in rounds(0, len(accepted), accepted.__getitem__)]
        return cls(len(emitted), sum(emitted))

    @property
    def acceptance_length(self) -> float:
        """Emitted tokens per round; NaN without rounds."""
        return self.tokens / self.rounds if self.rounds else float("nan")


def agreed(drafts: Iterable[int], text: Iterable[int]) -> int:
    """Count the accepted drafts: the length of the common prefix of `drafts` and `text`."""
    return sum(takewhile(bool, map(eq, drafts, text)))


def rounds(begin: int, end: int, accepted: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Yield where each round in answer positions [begin, end) begins, and how many tokens it emits.

    A round emits its accepted drafts and one token more, but never beyond `end`.

    Args:
        accepted: position → accepted drafts of the round there; called once per round, after the caller has handled the
            previous round.
    """
    while begin < end:
        emitted = min(accepted(begin) + 1, end - begin)
        yield begin, emitted
        begin += emitted


MAX_PERIOD = 48
MIN_REPEATS = 4
MIN_SPAN = 24


def loop_start(tokens: Sequence[int]) -> int | None:
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

"""Repeated n-grams that end an answer: small greedy models fall into them, and they flatter acceptance."""

from collections.abc import Sequence
from typing import NamedTuple

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


class Loop(NamedTuple):
    """Of an answer. seen: its length when the loop was noticed. start: where its second repetition begins."""

    seen: int
    start: int


def first_loop(answer: Sequence[int], every: int, *, ended: bool) -> Loop | None:
    """The loop at which a generator stops that looks for one every so many tokens, and at the end.

    Args:
        answer: all of it. ended: by its last token, which is no part of a loop.
    """
    whole = len(answer)
    for seen in [*range(every, whole, every), whole]:
        start = loop_start(answer[: seen - (ended and seen == whole)])
        if start is not None:
            return Loop(seen, start)
    return None

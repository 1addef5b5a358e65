"""Histories of rounds: routes, accepted lengths, and what happens to requests between them."""

from collections.abc import Sequence

from hypothesis import strategies as st
from replay import CONTEXT, ROWS, Replay

WIDEST = 8

route = st.sampled_from(["ar", "diffusion", "none"])
event = st.none() | st.tuples(st.sampled_from(("finish", "abort", "retract", "remap")), st.integers(0, ROWS - 1))
rounds = st.tuples(st.tuples(*[route] * ROWS), st.tuples(*[st.integers(1, WIDEST)] * ROWS), event, st.integers(1, 6))
"""Routes, accepted lengths (bonus included), what happens after it, and how often the round is repeated."""


History = Sequence[tuple[Sequence[str], Sequence[int], tuple[str, int] | None, int]]


def live(replay: Replay, history: History) -> None:
    """Play the history, then compare every row with one full pass."""
    for routes, accepts, after, times in history:
        for _ in range(times):
            if max(replay.lengths) > CONTEXT - 2 * WIDEST:
                break
            replay.round(routes, accepts)
        if after is not None:
            getattr(replay, after[0])(after[1])
    for row in range(ROWS):
        replay.check(row)

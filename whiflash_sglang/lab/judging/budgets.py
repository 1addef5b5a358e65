"""What several voices accept together, if a round verifies the likeliest of all their drafts, whatever a row costs."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from whiflash_sglang.train.replay import ARMS, JOINED, LOOKUP, Chain, Replay
from whiflash_sglang.train.rounds import Tally, rounds

BUDGETS = (8, 12, 16, 24)
"""Drafts that a round verifies."""

VOICES = {
    "eagle3": (JOINED[ARMS[0]], LOOKUP),
    "dflash": (JOINED[ARMS[1]], LOOKUP),
    "both": (*JOINED.values(), LOOKUP),
}
"""The drafters that run → whose drafts are merged: copies speak beside and behind each."""


def accepted_of(chains: Sequence[Chain], budget: int, text: Sequence[int]) -> int:
    """Drafts that are accepted if `chains` are merged at shared prefixes and the `budget` likeliest are verified.

    A draft that several chains share is as likely as the surest of them says. text: what follows the bonus token.
    """
    likely: dict[tuple[int, ...], float] = defaultdict(float)
    for tokens, alive in chains:
        for length, chance in enumerate(alive, 1):
            path = tuple(tokens[:length])
            likely[path] = max(likely[path], chance)
    # What comes before a draft is at least as likely and shorter, so it is verified too.
    verified = set(sorted(likely, key=lambda path: (-likely[path], len(path)))[:budget])
    longest = 0
    while tuple(text[: longest + 1]) in verified and longest < len(text):
        longest += 1
    return longest


def by_budget(answers: Sequence[Replay]) -> dict[str, dict[str, Any]]:
    """Acceptance lengths before loops, categories weighed the same.

    Args:
        answers: replays of two drafters, with their chains.

    Returns:
        A name of `VOICES` → budget (as text) → tokens a round.
    """
    return {
        name: {str(budget): _length(answers, among, budget) for budget in BUDGETS}
        for name, among in VOICES.items()
    }


def _length(answers: Sequence[Replay], among: Sequence[str], budget: int) -> float:
    tallies: dict[str, Tally] = defaultdict(Tally)
    for answer in answers:

        def accepted(position: int, answer: Replay = answer) -> int:
            chains = [answer.chains[arm][position] for arm in among]
            return accepted_of(chains, budget, answer.answer[position + 1 :])

        for _, emitted in rounds(0, answer.loop_from, accepted):
            tallies[answer.category].add(Tally(1, emitted))
    return float(np.mean([tally.acceptance_length for tally in tallies.values()]))


def budgets_table(result: dict[str, dict[str, Any]]) -> Table:
    """For a terminal."""
    table = Table(title="tokens per round with copies, by drafts that a round verifies, the likeliest of all")
    for column in ("drafters", *map(str, BUDGETS)):
        table.add_column(column, justify="left" if column == "drafters" else "right")
    for name, lengths in result.items():
        table.add_row(name, *(f"{length:.2f}" for length in lengths.values()))
    return table

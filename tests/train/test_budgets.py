"""Several voices' drafts, of which the likeliest are verified."""

import numpy as np
import pytest
import torch

from whiflash_sglang.lab.judging.budgets import VOICES, accepted_of, by_budget
from whiflash_sglang.train.replay import JOINED, LOOKUP, Chain, Replay

TEXT = [1, 2, 3, 4, 5]
FIRST = Chain([1, 2, 9], [0.9, 0.5, 0.4])
SECOND = Chain([1, 2, 3, 4], [0.6, 0.55, 0.3, 0.2])


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (5, 4), (9, 4)],
)
def test_shared_prefixes_cost_one_row_and_the_likeliest_come_first(budget: int, expected: int) -> None:
    """By chance: 1, 1 2, 1 2 9, 1 2 3, 1 2 3 4."""
    assert accepted_of([FIRST, SECOND], budget, TEXT) == expected


def test_the_text_ends_what_is_accepted() -> None:
    assert accepted_of([SECOND], 8, TEXT[:2]) == 2
    assert accepted_of([], 8, TEXT) == 0


def test_a_voice_more_never_accepts_less_where_all_are_verified() -> None:
    size, end = len(TEXT) - 1, np.zeros(len(TEXT) - 1)
    chains = [Chain(TEXT[at + 1 :][:1], [0.5]) for at in range(size)]
    copies = [Chain(TEXT[at + 1 :], [0.4] * (size - at)) for at in range(size)]
    answer = Replay(
        "a", "chat", {LOOKUP: end}, torch.zeros(size, 2), size, end, end > 0, end.astype(int), {},
        {**dict.fromkeys(JOINED.values(), chains), LOOKUP: copies}, TEXT,
    )  # fmt: skip
    found = by_budget([answer])
    assert set(found) == set(VOICES)
    assert found["both"]["24"] == found["eagle3"]["24"] == size

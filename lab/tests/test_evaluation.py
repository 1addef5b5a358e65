"""Figures of replayed drafters, for answers short enough to count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whiflash_lab.evaluation import Drafted, figures_table, tabulate
from whiflash_sglang.drafts.rounds import RoundTally

LOOPING = ["loop", "2.00", "1.00", "50%", "0%"]


def answer(eagle3: list[int], dflash: list[int], category: str = "chat", loop_from: int | None = None) -> Drafted:
    accepted = {"ar": np.array(eagle3), "diffusion": np.array(dflash)}
    return Drafted(category, accepted, len(eagle3) if loop_from is None else loop_from)


def test_an_answer_by_hand() -> None:
    # Rounds at 0 (2 accepted, 3 tokens), 3 (0, 1 token), 4 (5 accepted, cut to the 2 tokens that are left).
    assert RoundTally.of([2, 9, 9, 0, 5, 9]) == RoundTally(3, 6)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=60))
def test_rounds_emit_every_token_once(accepted: list[int]) -> None:
    assert RoundTally.of(accepted).tokens == len(accepted)


@pytest.mark.parametrize("arm", ["ar", "diffusion"])
def test_one_drafter_alone_has_figures_of_its_own(arm: str) -> None:
    result = tabulate([Drafted("chat", {arm: np.array([2, 0, 1, 0])}, 4)])
    assert result["overall"]["acceptance_length"] == {arm: 2.0}
    assert result["overall"]["rounds_won"] == {}


def test_loops_have_figures_of_their_own() -> None:
    result = tabulate([answer([0] * 4 + [3] * 4, [0] * 8, loop_from=4), answer([3] * 4, [0] * 4, loop_from=0)])
    assert result["categories"]["chat"]["acceptance_length"]["ar"] == 1.0
    assert result["overall"]["acceptance_length"]["ar"] == 1.0
    assert result["loop"]["acceptance_length"]["ar"] == 4.0
    only = {"bundle": "b", "prompts": 1, **tabulate([answer([1, 0], [0, 0], loop_from=0)])}
    assert figures_table(only)[:2] == (["category", "ar", "diffusion", "ar better", "diffusion better"], [LOOPING])


def test_categories_weigh_the_same_overall() -> None:
    result = tabulate([answer([1] * 40, [0] * 40, "code"), answer([0] * 4, [1] * 4, "json")])
    assert result["overall"]["acceptance_length"]["ar"] == pytest.approx(1.5)
    assert result["overall"]["rounds_won"] == {"ar": 0.5, "diffusion": 0.5}

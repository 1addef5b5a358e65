"""Walks through recorded acceptance, worked out by hand, and properties of the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.drafts.arms import LOOKUP, PAIR
from whiflash_train.replay import ALL_ARMS, Replay
from whiflash_train.rounds import RoundTally
from whiflash_train.walk import ORACLE, ORACLE_OF_THREE, RouterWalk, best_arms, tabulate, walk


def answer(
    eagle3: list[int],
    dflash: list[int],
    category: str = "chat",
    loop_from: int | None = None,
    lookup: list[int] | None = None,
) -> Replay:
    size = len(eagle3)
    copied = np.array(lookup or [0] * size)
    accepted = {"ar": np.array(eagle3), "diffusion": np.array(dflash), LOOKUP: copied}
    end = size if loop_from is None else loop_from
    return Replay("a", category, accepted, torch.zeros(size, 2), end, copied.astype(float), copied)


def test_a_walk_by_hand() -> None:
    # Rounds at 0 (2 accepted, 3 tokens), 3 (0, 1 token), 4 (5 accepted, cut to the 2 tokens that are left).
    one = answer([2, 9, 9, 0, 5, 9], [0] * 6)
    tally = RoundTally()
    walk(one, "ar", 0, 6, tally)
    assert (tally.rounds, tally.tokens) == (3, 6)
    assert tally.acceptance_length == 2.0


def test_the_oracle_takes_the_longer_draft_and_the_first_arm_on_a_tie() -> None:
    assert best_arms(answer([1, 2, 3], [1, 3, 2])) == {0: "ar", 1: "diffusion", 2: "ar"}


@pytest.mark.parametrize("arm", PAIR)
def test_one_drafter_alone_has_figures_of_its_own(arm: str) -> None:
    one = answer([2, 0, 1, 0], [2, 0, 1, 0], lookup=[0, 3, 0, 0])
    del one.accepted[next(other for other in PAIR if other != arm)]
    result = tabulate([one], {"wish": RouterWalk([best_arms(one)])})
    lengths = result["overall"]["acceptance_length"]
    assert set(lengths) == {arm, LOOKUP, "wish", ORACLE, ORACLE_OF_THREE}
    assert lengths[ORACLE] == lengths[arm] == lengths["wish"]
    assert result["overall"]["rounds_won"] == {}


def test_loops_are_a_column_of_their_own() -> None:
    result = tabulate([answer([0] * 4 + [3] * 4, [0] * 8, loop_from=4)], {})
    assert result["categories"]["chat"]["acceptance_length"]["ar"] == 1.0
    assert result["overall"]["acceptance_length"]["ar"] == 1.0
    assert result["loop"]["acceptance_length"]["ar"] == 4.0


def test_categories_weigh_the_same_overall() -> None:
    result = tabulate([answer([1] * 40, [0] * 40, "code"), answer([0] * 4, [1] * 4, "json")], {})
    assert result["overall"]["acceptance_length"]["ar"] == pytest.approx(1.5)
    assert result["overall"]["rounds_won"] == {"ar": 0.5, "diffusion": 0.5}


def test_a_perfect_router_recovers_the_whole_gain() -> None:
    answers = [answer([1, 1, 0, 0] * 6, [0, 0, 3, 3] * 6)]
    perfect = RouterWalk([best_arms(one) for one in answers])
    fixed = RouterWalk([dict.fromkeys(range(24), "diffusion")])
    result = tabulate(answers, {"perfect": perfect, "fixed": fixed})
    share = result["overall"]["oracle_gain_share"]
    assert share["perfect"] == pytest.approx(1.0)
    assert share["fixed"] == pytest.approx(0.0)
    nothing_to_gain = tabulate([answer([1] * 8, [0] * 8)], {"fixed": RouterWalk([dict.fromkeys(range(8), "ar")])})
    assert nothing_to_gain["overall"]["oracle_gain_share"] == {"fixed": None}


def test_dwell_delays_a_switch() -> None:
    one = answer([0] * 4, [0] * 4)
    wishes = {0: "ar", 1: "diffusion", 2: "ar", 3: "diffusion"}
    for dwell, eagle3 in ((0, 2), (2, 3), (4, 4)):
        tally = RoundTally()
        walk(one, wishes, 0, 4, tally, dwell)
        assert tally.won["ar"] == eagle3


def test_a_router_that_copies_has_an_oracle_of_three() -> None:
    one = answer([1] * 8, [0] * 8, lookup=[3, 0, 0, 0, 0, 0, 0, 0])
    copies = RouterWalk([{0: LOOKUP, **dict.fromkeys(range(1, 8), "ar")}], copies=True)
    result = tabulate([one], {"auto": copies})["overall"]
    lengths = result["acceptance_length"]
    assert lengths["auto"] == lengths[ORACLE_OF_THREE] == pytest.approx(8 / 3)
    assert lengths[ORACLE] == 2.0
    assert result["oracle_gain_share"]["auto"] == pytest.approx(1.0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=60))
def test_every_walk_emits_every_token_once(pairs: list[tuple[int, int]]) -> None:
    one = answer([first for first, _ in pairs], [second for _, second in pairs])
    for choose in (*PAIR, best_arms(one)):
        tally = RoundTally()
        walk(one, choose, 0, len(pairs), tally)
        assert tally.tokens == len(pairs)
        assert sum(tally.won.values()) == tally.rounds
    lengths = tabulate([one], {})["overall"]["acceptance_length"]
    assert set(lengths) == {*ALL_ARMS, ORACLE, ORACLE_OF_THREE}

"""Signals that tell the drafters apart, judged on replays made by hand."""

import numpy as np
import pytest
import torch

from whiflash_sglang.lab.judging.signals import ALWAYS, judge, running_means, signals_of, signals_table
from whiflash_sglang.train.replay import LOOKUP, Replay

SIZE = 24


def answer(eagle3: list[int], dflash: list[int], loop_from: int = SIZE) -> Replay:
    lengths = {"eagle3": np.array(eagle3), "dflash": np.array(dflash), LOOKUP: np.zeros(SIZE, np.int64)}
    expected = {"eagle3": np.array(eagle3, np.float64), "dflash": np.full(SIZE, 0.5)}
    none = np.zeros(SIZE)
    return Replay(
        "a", "chat", lengths, torch.zeros(SIZE, 2), loop_from, none, none > 0, none.astype(int), expected
    )


def test_a_signal_that_knows_recovers_the_whole_gain_and_one_that_does_not_none() -> None:
    one = answer([2, 2, 2, 0, 0] * 4 + [0] * 4, [0, 0, 0, 3, 0] * 4 + [0] * 4)
    better = one.accepted["eagle3"] - one.accepted["dflash"].astype(float)
    found = judge(
        [one, one], {"knows": [better] * 2, "constant": [np.zeros(SIZE)] * 2, "wrong": [-better] * 2}
    )
    assert found["knows"]["sign_accuracy"] == 1.0
    assert found["knows"]["oracle_gain_share"] == pytest.approx(1.0)
    assert found["knows"]["acceptance_length"] > found[ALWAYS]["acceptance_length"]
    for name in (ALWAYS, "constant"):
        assert found[name]["sign_accuracy"] == pytest.approx(12 / 16)
        assert found[name]["oracle_gain_share"] == pytest.approx(0.0)
    assert found["wrong"]["sign_accuracy"] < 0.8
    assert signals_table(found).row_count == 4


def test_loops_do_not_count() -> None:
    one = answer([1] * 8 + [0] * 16, [0] * 8 + [4] * 16, loop_from=8)
    found = judge([one], {"constant": [np.zeros(SIZE)]})
    assert found[ALWAYS]["sign_accuracy"] == 1.0
    assert found[ALWAYS]["acceptance_length"] == pytest.approx(2.0)
    assert np.isnan(found[ALWAYS]["oracle_gain_share"]), "nothing to gain"


def test_drafters_that_never_differ() -> None:
    found = judge([answer([1] * SIZE, [1] * SIZE)], {"constant": [np.zeros(SIZE)]})
    assert np.isnan(found["constant"]["sign_accuracy"])


def test_running_means_know_only_what_the_text_has_told() -> None:
    """A round's drafts reach `longest` tokens beyond its bonus token: until then nobody knows all that it accepts."""
    early, late = answer([5] + [0] * 23, [0] * SIZE), answer([0] * SIZE, [0] * SIZE)
    first, never = running_means(early, 5), running_means(late, 5)
    assert first[:6].tolist() == never[:6].tolist() == [0.0] * 6
    assert first[6] == 5.0
    assert 0 < first[7] < first[6]
    assert not never.any()


def test_confidences_speak_for_the_drafter_that_is_sure() -> None:
    one = answer([2, 0] * 12, [1] * SIZE)
    found = signals_of([one], [[0.1] * SIZE], None, 5)
    assert "neural" not in found
    assert found["confidence of eagle3"][0][:2].tolist() == [2.0, 0.0]
    assert found["confidence of dflash"][0][0] == -0.5
    assert found["both confidences"][0][:2].tolist() == [1.5, -0.5]
    judged = judge([one], found)
    assert (
        judged["both confidences"]["sign_accuracy"] == judged["confidence of eagle3"]["sign_accuracy"] == 1.0
    )
    assert judged["entropy"]["sign_accuracy"] == 0.5
    assert signals_of([one], [[0.1] * SIZE], [[1.0] * SIZE], 5)["neural"][0].sum() == SIZE

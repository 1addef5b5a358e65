"""Proposals of the copier, their chances, and lessons of committed tokens."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from searching import SEARCH, Looking

from whiflash_sglang.copying.calibration import BUCKETS, EVEN_ODDS, Agreement, MatchCalibration
from whiflash_sglang.copying.texts import Prediction
from whiflash_sglang.drafts.candidates import Candidate
from whiflash_sglang.records.core import PLACEHOLDERS, readable


def copier_of(*tokens: int, **options: object) -> Looking:
    copier = Looking(**options)  # type: ignore[arg-type]
    copier.read(tokens)
    return copier


def tokens_of(copy: Candidate) -> list[int]:
    return list(copy.tokens)


def test_the_longest_match_is_copied_and_the_newest_of_equals() -> None:
    assert tokens_of(copier_of(1, 2, 9, 1, 2, 7, 1, 2).look(3, 0.0)) == [7, 1, 2]
    assert tokens_of(copier_of(5, 1, 2, 9, 8, 1, 2, 7, 5, 1, 2).look(2, 0.0)) == [9, 8]


def test_copies_end_before_an_image_and_match_nothing_across_it() -> None:
    """Its positions have ids of their own below zero."""
    image = readable([1, 2, *[PLACEHOLDERS + 7] * 3, 3, 4], 0)
    assert image == [1, 2, -4, -5, -6, 3, 4]
    assert readable(array("q", [5, PLACEHOLDERS, 6]), 1) == [-3, 6]
    assert readable([1, 2, 3], 1) == [2, 3]
    assert tokens_of(copier_of(9, *image, 8, 9).look(9, 0.0)) == [1, 2]
    assert tokens_of(copier_of(*image, 8, 2).look(9, 0.0)) == []
    again = readable([1, 2, *[PLACEHOLDERS + 7] * 3, 3, 4, 1, 2, *[PLACEHOLDERS + 7] * 3, 3])
    assert copier_of(*again).look(1, 0.0).matched == 1


def test_what_is_committed_teaches_whoever_drafted() -> None:
    calibration = MatchCalibration()
    copier = Looking(calibration)
    copier.read([1, 2, 9, 8, 7, 1, 2])
    assert tokens_of(copier.look(3, 0.0)) == [9, 8, 7]
    before = [calibration.chance(length, Agreement.ALONE) for length in (2, 3, 4)]
    copier.read([9, 5])  # the first copy was right, the second wrong, the third is unknown
    after = [calibration.chance(length, Agreement.ALONE) for length in (2, 3, 4)]
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert after[2] == before[2]


def test_a_copy_ends_with_the_token_that_ends_the_turn() -> None:
    copier = copier_of(1, 2, 9, 0, 5, 6, 1, 2, stops=(0,))
    assert tokens_of(copier.look(5, 0.0)) == [9, 0]
    assert tokens_of(copier.look_beyond([9], 1.0, 5, 0.0)) == [0]
    assert not tokens_of(copier.look_beyond([9, 0], 1.0, 5, 0.0))
    assert tokens_of(copier_of(1, 2, 9, 0, 5, 6, 1, 2).look(5, 0.0)) == [9, 0, 5, 6, 1]


def test_drafts_lead_into_a_copy() -> None:
    copier = copier_of(5, 6, 1, 2, 9, 8, 7, 3, 4, 6)
    committed = tokens_of(copier.look(2, 0.0))
    assert tokens_of(copier.look_beyond([1, 2], 1.0, 3, 0.0)) == [9, 8, 7]
    longer = tokens_of(copier.look_beyond([1, 2], 1.0, 9, 0.0))
    assert longer == [9, 8, 7, 3, 4, 6, 1, 2, 9], "the text goes on with the drafts"
    assert not tokens_of(copier.look_beyond([11, 12], 1.0, 3, 0.0))
    learned = tokens_of(copier.last_copy(Candidate(committed)))
    assert learned == committed, "what the text's end says is still what is learned from"


def test_a_late_copy_is_cut_by_the_chance_after_the_rows_that_are_paid() -> None:
    whole = copier_of(*range(9), 1, 2).look(6, 0.0).alive
    price = whole[4] / whole[2]  # two more pay after three
    assert len(copier_of(*range(9), 1, 2).look(6, price * 0.99, 3).alive) == 5
    assert len(copier_of(*range(9), 1, 2).look(6, price * 0.99).alive) < 5
    behind = copier_of(*range(9)).look_beyond([1, 2], 0.01, 6, 0.99, 2)
    assert len(behind.tokens) == 2, "those that are paid stay, however unlikely"


def test_how_a_request_copies_its_text_says_nothing_of_its_prediction() -> None:
    """Copies of that are judged by its own table only, and are no evidence of how the request copies."""
    copier = copier_of(1, 2, prediction=Prediction(SEARCH, range(100, 120), 2))
    for _ in range(200):
        copier.habit.observe(0.5, False)
    factor, proposal = copier.habit.factor, copier.look(4, 0.0)
    assert (proposal.parts[0].source, tokens_of(proposal)) == ("prediction", [100, 101, 102, 103])
    fresh = copier_of(1, 2, prediction=Prediction(SEARCH, range(100, 120), 2)).look(4, 0.0)
    assert factor < 0.5
    assert proposal.alive == pytest.approx(fresh.alive)
    copier.read([100, 7])
    assert copier.habit.factor == factor


def test_a_seed_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{len(BUCKETS)} rows"):
        MatchCalibration(EVEN_ODDS[1:])
    with pytest.raises(ValueError, match="alone, unanimous, leading, contested"):
        MatchCalibration([(0.5,)] * len(BUCKETS))


@given(st.integers(1, 10_000), st.sampled_from(Agreement))
def test_every_length_has_a_chance(length: int, agreement: Agreement) -> None:
    calibration = MatchCalibration()
    bucket = calibration.bucket(length)
    assert BUCKETS[bucket] <= length
    assert bucket == len(BUCKETS) - 1 or length < BUCKETS[bucket + 1]
    assert calibration.chance(length, agreement) == 0.5


def test_a_copy_goes_on_where_it_was_though_newer_places_hide_it() -> None:
    """It has copied 15 tokens a round from a token repeated 60 times, whose newest places are those at its end."""
    copier = copier_of(1, 2, *[7] * 60, 3, 4, 5, 9, 1, 2)
    for _ in range(4):
        copier.read(tokens_of(copier.look(15, 0.0)))
    assert tokens_of(copier.look(3, 0.0)) == [3, 4, 5]
    assert tokens_of(copier.look_beyond([3, 4], 1.0, 2, 0.0)) == [5, 9]

"""Place of an answer in its prediction, appeared parts of the prediction, and copies of it."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import SEARCH, Looking

from whiflash_sglang.copying.calibration import MatchCalibration
from whiflash_sglang.copying.texts import Prediction

TEXT = list(range(100, 140))
PROMPT = [1, 2, 3]


def copier_of(predicted: Sequence[int], answer: Sequence[int], prompt: Sequence[int] = PROMPT) -> Looking:
    copier = Looking(prediction=Prediction(SEARCH, predicted, len(prompt)))
    copier.read([*prompt, *answer])
    return copier


def copied(copier: Looking, limit: int = 5) -> list[int]:
    return list(copier.look(limit, 0.0).tokens)


def test_the_beginning_is_proposed_before_anything_was_written() -> None:
    assert copied(copier_of(TEXT, [])) == TEXT[:5]
    assert copied(copier_of(TEXT, TEXT[:1])) == TEXT[1:6]


def test_the_prompts_end_is_no_place_of_the_prediction() -> None:
    assert copied(copier_of([3, 50, 51, 52], [], prompt=[1, 2, 3])) == [3, 50, 51, 52]


@pytest.mark.parametrize(
    ("written", "ahead"),
    [
        ([*TEXT[:10], 7, TEXT[11]], TEXT[12:17]),  # another token in the place of one
        ([*TEXT[:10], 7, 8, 9, TEXT[10]], TEXT[11:16]),  # tokens between two
        ([*TEXT[:10], TEXT[20]], TEXT[21:26]),  # some left out
        ([7, 8, TEXT[0]], TEXT[1:6]),  # something before it
    ],
)
def test_an_answer_is_followed_through_its_edits(written: list[int], ahead: list[int]) -> None:
    assert copied(copier_of(TEXT, written)) == ahead


def test_of_equal_places_the_one_that_comes_next_is_copied() -> None:
    """Lines begin alike: neither the newest nor the oldest is meant, but the one behind the edit."""
    lines = [token for line in range(20) for token in (0, 1, 100 + line, 200 + line)]
    written = [*lines[:18], 7, 8, 0, 1]  # line 4 is edited behind its beginning
    assert copied(copier_of(lines, written)) == [105, 205, 0, 1, 106]


def test_a_place_is_found_that_the_chains_do_not_reach() -> None:
    many = [token for line in range(100) for token in (0, 1, 100 + line, 300 + line)]
    assert copied(copier_of(many, [*many[:10], 7, 0, 1]), 2) == [103, 303]


def test_of_places_far_away_the_next_one_is_copied() -> None:
    text = list(range(1000, 1400))
    for place in (2, 150, 300):
        text[place : place + 2] = [7, 8]
    assert copied(copier_of(text, [*text[:10], 5, 7, 8])) == text[152:157]


@pytest.mark.parametrize(("followed", "place"), [(2, 20), (3, 330)])
def test_a_place_is_given_up_when_enough_of_another_was_followed(followed: int, place: int) -> None:
    text = list(range(1000, 1400))
    text[20:22] = text[330:332] = [7, 8]
    other = text[300 : 301 + followed]  # the first token is the one by which it is found
    assert copied(copier_of(text, [*text[:10], 5, *other, 6, 7, 8])) == text[place + 2 : place + 7]


def test_it_is_preferred_to_the_prompt_where_both_match_as_long() -> None:
    other = [*TEXT[:3], 9, 9]
    assert copied(copier_of(TEXT, TEXT[:3], prompt=other)) == TEXT[3:8]


def test_a_prediction_that_is_not_followed_comes_last() -> None:
    answer = [token for i in range(20) for token in (50, 60 + i)]
    wrong = [50, 1] * 4
    assert copied(copier_of(wrong, [*answer, 60, 50], prompt=[50, 61])) == copied(
        copier_of([], [*answer, 60, 50], prompt=[50, 61])
    )


def test_what_predictions_teach_stays_with_their_request() -> None:
    shared = MatchCalibration()
    before = list(shared.chances)
    copier = Looking(shared, prediction=Prediction(SEARCH, TEXT, len(PROMPT)))
    copier.read([*PROMPT, TEXT[0]])
    copier.look(8, 0.0)
    copier.read(TEXT[1:12])
    assert shared.chances == before
    assert copier.look(8, 0.0).alive[0] > MatchCalibration().chance(9, 0)  # type: ignore[arg-type]


def test_drafts_that_lead_into_it_are_prolonged() -> None:
    copier = copier_of(TEXT, TEXT[:4])

    def behind(drafts: Sequence[int]) -> list[int]:
        return list(copier.look_beyond(drafts, 1.0, 3, 0.1).tokens)

    assert behind(TEXT[4:6]) == TEXT[6:9]
    assert behind([7, TEXT[9]]) == TEXT[10:13]


def counted(predicted: Sequence[int], answer: Sequence[int]) -> tuple[int, int]:
    found = Prediction(SEARCH, predicted)
    found.follow(answer)
    return found.appeared


def test_what_appeared_is_counted() -> None:
    assert counted(TEXT, TEXT) == (40, 0)
    assert counted(TEXT, TEXT[:10]) == (10, 30)
    assert counted(TEXT, range(40)) == (0, 40)
    assert counted([], TEXT) == (0, 0)
    assert counted(TEXT, []) == (0, 40)
    # Not 7, nor the token by which it was found again.
    assert counted(TEXT, [*TEXT[:10], 7, *TEXT[11:]]) == (38, 2)
    assert counted([5, 6, 7], [5, 6, 7] * 4) == (3, 0)


tokens = st.lists(st.integers(0, 4), max_size=60)


@settings(max_examples=200, deadline=None)
@given(tokens, tokens, st.lists(st.integers(0, 60), max_size=5))
def test_counts_do_not_depend_on_rounds(predicted: list[int], answer: list[int], cuts: list[int]) -> None:
    whole, parts = Prediction(SEARCH, predicted), Prediction(SEARCH, predicted, 3)
    whole.follow(answer)
    borders = sorted({0, *(min(cut, len(answer)) for cut in cuts), len(answer)})
    parts.follow([9, 9])
    parts.follow([9, *answer[: borders[1] if len(borders) > 1 else 0]])
    for begin, end in pairwise(borders[1:]):
        parts.follow(answer[begin:end])
    assert parts.appeared == whole.appeared
    right, wrong = whole.appeared
    assert right + wrong == len(predicted)
    assert 0 <= right <= min(len(predicted), len(answer))

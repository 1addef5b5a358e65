"""Place of an answer in its prediction, appeared parts of the prediction, and copies of it."""

from collections.abc import Sequence

import pytest
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


def test_it_is_preferred_to_the_prompt_where_both_match_as_long() -> None:
    other = [*TEXT[:3], 9, 9]
    assert copied(copier_of(TEXT, TEXT[:3], prompt=other)) == TEXT[3:8]


def test_what_predictions_teach_stays_with_their_request() -> None:
    shared = MatchCalibration()
    before = list(shared.chances)
    copier = Looking(shared, prediction=Prediction(SEARCH, TEXT, len(PROMPT)))
    copier.read([*PROMPT, TEXT[0]])
    copier.look(8, 0.0)
    copier.read(TEXT[1:12])
    assert shared.chances == before
    assert copier.look(8, 0.0).alive[0] > MatchCalibration().chance(9, 0)  # type: ignore[arg-type]


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

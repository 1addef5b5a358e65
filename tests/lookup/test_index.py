"""The index against a search of the whole text, and its bounds on adversarial text."""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.lookup.calibration import BUCKETS, MatchCalibration
from whiflash_sglang.lookup.index import MAX_CANDIDATES, MAX_MATCH, SuffixIndex


def by_search(text: list[int]) -> int:
    """Length of the longest earlier occurrence of the text's end, searched in every place."""
    end, best = len(text) - 1, 0
    for place in range(end):
        length = 0
        while length <= place and length < MAX_MATCH and text[place - length] == text[end - length]:
            length += 1
        best = max(best, length)
    return best if best >= 2 else 0


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(1, 7), max_size=12))
def test_a_match_is_real_and_the_longest(text: list[int], cuts: list[int]) -> None:
    index, at = SuffixIndex(), 0
    for cut in [*cuts, len(text)]:
        index.extend(text[at : at + cut])
        at += cut
    text = text[:at]
    match = index.match()
    if match.length:
        assert text[match.source - match.length : match.source] == text[len(text) - match.length :]
    longest = by_search(text)
    occurrences = sum(text[i : i + 2] == text[-2:] for i in range(len(text) - 2))
    assert match.length == longest or (match.length <= longest and occurrences > MAX_CANDIDATES)


def test_the_newest_of_equal_matches_is_copied() -> None:
    index = SuffixIndex([1, 2, 9, 1, 2, 7, 1, 2])
    match = index.match()
    assert (match.length, list(index.continuation(match.source, 3))) == (2, [7, 1, 2])


def test_a_repeated_unit_continues_itself() -> None:
    index = SuffixIndex([5, 6, 7] * 4)
    match = index.match()
    assert list(index.continuation(match.source, 7)) == [5, 6, 7, 5, 6, 7, 5]


def test_nothing_to_copy() -> None:
    assert SuffixIndex([]).match().length == 0
    assert SuffixIndex([4]).match().length == 0
    assert SuffixIndex(range(100)).match().length == 0


def test_work_of_a_query_is_bounded() -> None:
    """Comparisons, counted: one token repeated, and a de Bruijn sequence, stay within the stated bound."""

    class Counting(SuffixIndex):
        """Counts the tokens that a query reads."""

        reads = 0

        def match(self):  # type: ignore[no-untyped-def]
            tokens = self._tokens

            class Spy:
                def __len__(self) -> int:
                    return len(tokens)

                def __getitem__(self, i: int) -> int:
                    Counting.reads += 1
                    return tokens[i]

            self._tokens = Spy()  # type: ignore[assignment]
            try:
                return super().match()
            finally:
                self._tokens = tokens

    rng = random.Random(0)
    texts = [
        [7] * 8000,
        [a for pair in itertools.product(range(60), repeat=2) for a in pair],
        [rng.randrange(3) for _ in range(4000)],
    ]
    for text in texts:
        Counting.reads = 0
        Counting(text).match()
        assert Counting.reads <= 2 * MAX_CANDIDATES * MAX_MATCH


def test_calibration_learns_in_both_directions() -> None:
    calibration = MatchCalibration()
    before = calibration.expected(2, 8)
    for _ in range(300):
        calibration.observe(2, 8, 0)
    worse = calibration.expected(2, 8)
    for _ in range(900):
        calibration.observe(2, 8, 8)
    assert worse < before < calibration.expected(2, 8)


@given(st.integers(2, 40), st.integers(1, 16), st.floats(0.01, 0.9))
def test_width_and_expectation_are_bounded(length: int, limit: int, worth: float) -> None:
    calibration = MatchCalibration()
    width = calibration.width(length, limit, worth)
    assert 1 <= width <= limit
    assert 0.0 <= calibration.expected(length, width) <= width
    assert 0 <= calibration.bucket(length) < len(BUCKETS)

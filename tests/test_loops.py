"""Loop detection: what counts as a loop and where it is cut."""

from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.drafts.rounds import MAX_PERIOD, MIN_REPEATS, MIN_SPAN, loop_start


def test_three_passes_and_a_short_run_of_one_token_are_no_loops() -> None:
    assert loop_start([1, 2, 3] + list(range(10, 20)) * 3) is None
    assert loop_start([1, 2, *[5] * (MIN_SPAN - 1)]) is None
    assert loop_start([1, 2, *[5] * MIN_SPAN]) == 3


@settings(deadline=None, max_examples=60)
@given(
    prefix=st.lists(st.integers(1000, 1005), max_size=30),
    period=st.integers(1, MAX_PERIOD),
    repeats=st.integers(MIN_REPEATS, 7),
    partial=st.integers(0, 47),
)
def test_every_long_enough_loop_is_found(prefix: list[int], period: int, repeats: int, partial: int) -> None:
    phrase = list(range(period))
    tail = phrase * repeats + phrase[: partial % period]
    if len(tail) >= MIN_SPAN:
        assert loop_start(prefix + tail) == len(prefix) + period

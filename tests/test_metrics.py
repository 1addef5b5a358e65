"""The round's clock, as the cost model reads it."""

import pytest

from whiflash_sglang import metrics
from whiflash_sglang.metrics import RoundClock


@pytest.mark.parametrize(("pause", "gap"), [(0.002, 0.002), (60.0, 0.030)])
def test_the_gap_between_two_rounds_is_no_pause(
    monkeypatch: pytest.MonkeyPatch, pause: float, gap: float
) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = RoundClock()
    assert clock.begin() is None
    clock.drafted(0.005)
    now[0] += 0.030
    clock.learned(2)
    clock.end(rows=4, requests=1)
    now[0] += pause
    previous = clock.begin()
    assert previous is not None
    assert (previous.rows, previous.tokens) == (4, 2)
    assert (previous.seconds, previous.drafting, previous.gap) == pytest.approx((0.030, 0.005, gap))


def test_what_an_interruption_ends_says_nothing() -> None:
    clock = RoundClock()
    clock.begin()
    clock.learned(1)
    clock.end(rows=1, requests=1)
    clock.interrupt()
    assert clock.begin() is None

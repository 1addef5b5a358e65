"""The round's clock, as the cost model reads it."""

import pytest
from device_clock import DeviceClock

from whiflash_sglang.device import clock as clocks
from whiflash_sglang.prices.round_clock import RoundClock, RoundTime


class Events(DeviceClock):
    """A device's events, which come when the test says so."""

    def wait(self, mark: float) -> None:
        raise AssertionError("a round does not wait for its own time")


@pytest.mark.parametrize(("pause", "gap"), [(0.002, 0.002), (60.0, 0.030)])
def test_the_gap_between_two_rounds_is_no_pause(monkeypatch: pytest.MonkeyPatch, pause: float, gap: float) -> None:
    now = [100.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])
    clock = RoundClock()
    assert clock.begin() == []
    now[0] += 0.030
    clock.learned(time := RoundTime(4, 1), 2)
    clock.end(time)
    now[0] += pause
    (previous,) = clock.begin()
    assert (previous.rows, previous.tokens) == (4, 2)
    assert (previous.seconds, previous.gap) == pytest.approx((0.030, gap))


def test_rounds_on_a_device_are_timed_by_its_events_when_they_have_come() -> None:
    """The host issues three rounds while the device is still busy with the first: no time of theirs is known yet."""
    events = Events()
    clock = RoundClock(events)
    for number, begins in enumerate((0.0, 10.0, 30.0), start=1):
        events.now = begins
        assert clock.begin() == []
        clock.learned(time := RoundTime(number, 1), number)
        events.now = begins + 8.0
        clock.end(time)
    events.now, events.done = 60.0, 30.0
    first, second = clock.begin()
    found = [(r.rows, r.tokens, r.seconds, r.gap) for r in (first, second)]
    assert found == [(1, 1, 8.0, 2.0), (2, 2, 8.0, 8.0)], "a pause of 12 s says nothing of the engine"
    events.now = 68.0
    clock.end(RoundTime(4, 1))
    clock.interrupt()
    events.now = events.done = 100.0
    (third,) = clock.begin()
    assert (third.rows, third.tokens) == (3, 3)


@pytest.mark.parametrize("between", [2, 3, 50])
def test_a_round_has_its_own_tokens_whatever_interrupts(between: int) -> None:
    """Under overlap a round is learned while the next one runs, or a prefill; the sixth is never learned."""
    clock, late, found = RoundClock(events := Events()), RoundTime(40, 8), []
    for number in range(300):
        if number % between == 0:
            clock.interrupt()
        found += clock.begin()
        events.now = events.done = events.now + 0.02
        clock.end(time := RoundTime(40, 8))
        if number != 6:
            clock.learned(late, 32)
        late = time
    assert len(found) > 295 * (1 - 1 / between)
    assert {(each.tokens, round(each.seconds + each.gap, 6)) for each in found} == {(32, 0.02)}

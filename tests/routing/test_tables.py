"""Prices from tables, on a clock that the test moves."""

import pytest

from whiflash_sglang.device.clock import HostClock, clock_of, measure
from whiflash_sglang.prices.fits import WINDOW
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.prices.tables import Correction, CostTables, Sizes, Verifications


class Moved:
    """A clock whose work is done when somebody waits for it, as a device's is."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, -1.0

    def record(self) -> float:
        return self.now

    def passed(self, mark: float) -> bool:
        return mark <= self.done

    def wait(self, mark: float) -> None:
        self.done = max(self.done, mark)

    def elapsed(self, begin: float, end: float) -> float:
        if not (self.passed(begin) and self.passed(end)):
            raise AssertionError("read before it has come")
        return end - begin


def test_a_measurement_is_the_median_behind_a_first_run_and_waits_for_each() -> None:
    clock, durations = Moved(), iter([50.0, 1.0, 9.0, 2.0, 3.0, 2.5])

    def body() -> None:
        clock.now += next(durations)

    assert measure(body, clock) == 2.5


def test_the_hosts_clock_does_not_run_backwards() -> None:
    import torch

    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    begin = clock.record()
    assert clock.passed(begin)
    assert clock.elapsed(begin, clock.record()) >= 0.0


def test_a_price_is_the_graphs_that_holds_the_rows() -> None:
    table = Sizes.measured([4, 1, 2, 8], {1: 1.0, 2: 1.5, 4: 1.4, 8: 3.0}.__getitem__)
    assert table.sizes == (1, 2, 4, 8)
    assert [table.at(n) for n in (1, 2, 3, 4, 5, 8, 16)] == [1.0, 1.5, 1.5, 1.5, 3.0, 3.0, 6.0]


def test_tables_without_order_are_refused() -> None:
    with pytest.raises(ValueError, match="ascend"):
        Sizes((2, 1), (1.0, 1.0))
    with pytest.raises(ValueError, match="differ"):
        Verifications(10, 10, Sizes((1,), (1.0,)), Sizes((1,), (1.0,)))


def tables() -> CostTables:
    verifications = Verifications(
        100, 1100, Sizes((1, 4, 8), (1.0, 1.6, 2.4)), Sizes((1, 4, 8), (2.0, 2.6, 4.4))
    )
    return CostTables(verifications, {"ar": Sizes((1, 2), (0.5, 0.6))}, {"ar": Sizes((8,), (0.1,))})


def test_a_verification_grows_with_its_context() -> None:
    costs = tables()
    assert [costs.verify(3, n) for n in (0, 100, 600, 1100, 2100)] == pytest.approx([1.6, 1.6, 2.1, 2.6, 3.6])
    assert costs.draft("ar", 2) == 0.6
    assert costs.draft("lookup", 2) == costs.draft("ar", 0) == 0.0


def test_a_row_costs_the_slope_around_the_load() -> None:
    costs = tables()
    assert costs.row(1, 100) == costs.row(3, 100) == pytest.approx(0.2)
    assert costs.row(4, 100) == costs.row(100, 100) == pytest.approx(0.2)
    assert costs.row(4, 1100) == pytest.approx(0.45)
    alone = Verifications(0, 1, Sizes((4,), (2.0,)), Sizes((4,), (2.0,)))
    assert CostTables(alone, {}, {}).row(1, 0) == 0.5


def test_rounds_correct_everything_by_one_factor() -> None:
    costs = tables()
    for _ in range(50):
        costs.took(RoundTime(4, 3, 100, {"ar": 2, "lookup": 1}, {"ar": 3}, seconds=2 * (1.6 + 0.6 + 0.1)))
    assert costs.correction.factor == pytest.approx(2.0, rel=0.02)
    assert costs.draft("ar", 2) == pytest.approx(1.2, rel=0.02)


def test_a_slow_moment_moves_little_and_a_slower_machine_is_believed() -> None:
    correction = Correction()
    for _ in range(100):
        correction.add(1.0, 1.0)
    correction.add(1.0, 1000.0)
    assert correction.factor < 1.05
    for _ in range(WINDOW):
        correction.add(1.0, 5.0)
    assert correction.factor == pytest.approx(5.0, rel=0.1)
    with pytest.raises(ValueError, match="takes time"):
        correction.add(1.0, 0.0)

"""Slow moments and slower machines: `auto` on simulated clocks, seeded.

EAGLE-3 drafts in 5 ms and DFlash in 12, three tokens a round are accepted of either; a verification takes 30 ms and
0.6 ms a row; all with lognormal noise. So EAGLE-3 is the better arm by a sixth, and plain decoding is far behind.
"""

import math
import random
from collections import Counter

import pytest
from matrix import sampled
from priced import priced

from whiflash_sglang.drafts.candidates import Forecast
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.records.request import Request
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.policies import AutoPolicy

WIDTHS = {"ar": 6, "diffusion": 8, "none": 1}
ACCEPTED = {"ar": 3, "diffusion": 3, "none": 1}
NOISE = 0.2
SECONDS = {"ar": 0.006, "diffusion": 0.013}  # a pass with its catch-up


class Machine:
    """One server, one endless request. slower: factor on all work."""

    def __init__(self, noise: float = NOISE, seed: int = 0) -> None:
        self.slower = 1.0
        self.copies: Forecast | None = None
        self.costs = priced(lambda arm: WIDTHS.get(arm, 17), SECONDS)
        self.controller = Controller(AutoPolicy(), self.costs, [b"a"])
        self.controller.open(Request("r"), [0])
        self._rng, self._noise = random.Random(seed), noise

    def took(self, seconds: float) -> float:
        return seconds * self.slower * math.exp(self._rng.gauss(0, self._noise))

    def round(self, stall: str | None = None) -> str:
        """Run one round; `stall`: "work" or "gap", which takes ten seconds longer."""
        forecast: dict[str, Forecast | None] = {"ar": None, "diffusion": None}
        if self.copies is not None:
            forecast["lookup"] = self.copies
        state = self.controller.states[0]
        (arm,) = self.controller.route([state], [forecast])
        if arm == "none" and state.decision.promised:
            arm = "lookup"
        drafted = {arm: 1} if arm in SECONDS else {}
        copied = self.copies or Forecast(1, 1)
        rows = WIDTHS.get(arm, copied.rows)
        tokens = ACCEPTED.get(arm) or round(copied.length)
        work = sum(map(self.took, (SECONDS.get(arm, 0.0), 0.030 + 0.0006 * rows)))
        seconds, gap = work + 10.0 * (stall == "work"), self.took(0.004) + 10.0 * (stall == "gap")
        self.costs.observe(RoundTime(rows, 1, 0, drafted, tokens=tokens, seconds=seconds, gap=gap))
        self.controller.committed(state, state.decision, arm, [0] * tokens, rows)
        self.controller.wanted(state, state.decision, "promised" if arm == "lookup" else arm, rows - 1)
        return arm

    def rounds(self, count: int) -> Counter[str]:
        return Counter(self.round() for _ in range(count))


@pytest.mark.parametrize("seed", sampled(range(5), 0))
@pytest.mark.parametrize("stall", ["work", "gap"])
@pytest.mark.parametrize("before", [0, 1, 200])
@pytest.mark.parametrize("best", ["ar", "lookup"])
def test_ten_seconds_once(best: str, stall: str, before: int, seed: int) -> None:
    """In the first round, the second, or after hundreds: the better arm is back within fifty rounds."""
    machine = Machine(seed=seed)
    machine.copies = Forecast(9.0, 9) if best == "lookup" else None
    machine.rounds(before)
    machine.round(stall)
    machine.rounds(50)
    assert machine.rounds(300)[best] >= 290


@pytest.mark.parametrize("seed", sampled(range(5), 0))
def test_copies_that_bring_little_are_never_tried(seed: int) -> None:
    """Thousands of rounds, more than between two probes: what they would have brought is known from each of them."""
    machine = Machine(seed=seed)
    machine.copies = Forecast(1.2, 12)
    assert machine.rounds(3_000)["lookup"] == 0
    machine.copies = Forecast(9.0, 12)
    assert machine.rounds(20)["lookup"] >= 18, "the first round that promises much is theirs"


@pytest.mark.parametrize("seed", sampled(range(5), 0))
@pytest.mark.parametrize("longest", [0, 300])
def test_a_short_copy_is_priced_by_its_own_rows(longest: int, seed: int) -> None:
    """Before any copy, and after hundreds of the widest: three tokens in four rows beat three in six and a draft."""
    machine = Machine(seed=seed)
    machine.copies = Forecast(9.0, 17)
    machine.rounds(longest)
    machine.copies = Forecast(2.9, 4)
    assert machine.rounds(300)["lookup"] >= 285


@pytest.mark.parametrize("seed", sampled(range(5), 0))
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_machine_that_stays_slower_or_faster(factor: float, seed: int) -> None:
    machine = Machine(seed=seed)
    machine.rounds(300)
    machine.slower = factor
    machine.rounds(30)
    assert machine.costs.draft("ar", 1) == pytest.approx(SECONDS["ar"] * factor, rel=0.25)
    assert machine.costs.lasts(machine.costs.verify(6, 1)) == pytest.approx(0.0376 * factor, rel=0.25)
    assert machine.rounds(300)["ar"] >= 280


@pytest.mark.parametrize("noise", [0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("seed", sampled(range(3), 0))
def test_ordinary_noise_changes_nothing(noise: float, seed: int) -> None:
    """Neither routes that go back and forth, nor probes beyond those that are due."""
    machine = Machine(noise, seed)
    machine.rounds(1000)
    assert machine.rounds(2000)["ar"] >= (1980 if noise < 0.5 else 1960)

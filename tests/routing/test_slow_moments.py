"""Slow moments and slower machines: `auto` on simulated clocks, seeded.

EAGLE-3 drafts in 5 ms and DFlash in 12, three tokens a round are accepted of either; a verification takes 30 ms and
0.6 ms a row; all with lognormal noise. So EAGLE-3 is the better arm by a sixth, and plain decoding is far behind.
"""

import math
import random
from collections import Counter

import pytest
from matrix import sampled

from whiflash_sglang.drafts.candidates import Forecast
from whiflash_sglang.prices.costs import MeasuredCosts
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.records.request import Request
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.policies import AutoPolicy

WIDTHS = {"ar": 6, "diffusion": 8, "none": 1}
ACCEPTED = {"ar": 3, "diffusion": 3, "none": 1}
NOISE = 0.2
STAGES = ("draft", "verify", "catch_up", "gap", "look")


class Machine:
    """One server, one endless request. seconds: of a draft by arm; slower: factor on every stage."""

    def __init__(self, noise: float = NOISE, seed: int = 0) -> None:
        self.seconds = {"ar": 0.005, "diffusion": 0.012}
        self.slower = 1.0
        self.copies: Forecast | None = None
        self.costs = MeasuredCosts(lambda arm: WIDTHS.get(arm, 17))
        self.controller = Controller(AutoPolicy(), self.costs, [b"a"])
        self.controller.open(Request("r"), [0])
        self._rng, self._noise = random.Random(seed), noise

    def took(self, seconds: float) -> float:
        return seconds * self.slower * math.exp(self._rng.gauss(0, self._noise))

    def profiled(self, **factors: float) -> "Machine":
        """After the profile of a start, in which some arms took so many times longer."""
        for arm in self.seconds:
            for requests in (1, 2, 4, 8):
                seconds = self.seconds[arm] * (1 + 0.1 * (requests - 1)) * factors.get(arm, 1.0)
                self.costs.drafted(arm, requests, 5, seconds)
        return self

    def round(self, stall: str | None = None) -> str:
        """One round; `stall`: the stage that takes ten seconds longer."""
        late = {stage: 10.0 * (stage == stall) for stage in STAGES}
        forecast: dict[str, Forecast | None] = {"ar": None, "diffusion": None}
        if self.copies is not None:
            forecast["lookup"] = self.copies
        (arm,) = self.controller.route([self.controller.states[0]], [forecast])
        if arm == "none" and self.controller.states[0].decision.promised:
            arm = "lookup"
        drafts = []
        if arm in self.seconds:
            drafting, catch_up = self.took(self.seconds[arm]), self.took(0.001)
            drafts = [(arm, 1, 5, drafting + late["draft"], catch_up + late["catch_up"])]
        # Arms that copy looked before, whichever arm drafts: that is no drafting, but the rest of the round.
        copied = self.copies or Forecast(1, 1)
        rows = WIDTHS.get(arm, copied.rows)
        verifying = self.took(0.030 + 0.0006 * rows) + 0.0001 * self.slower + late["verify"] + late["look"]
        tokens = ACCEPTED.get(arm) or round(copied.length)
        spent, gap = sum(sum(each[3:]) for each in drafts), self.took(0.004) + late["gap"]
        self.costs.observe(
            RoundTime(
                rows, 1, tokens=tokens, seconds=spent + verifying, gap=gap, drafting=spent, drafts=drafts
            )
        )
        state = self.controller.states[0]
        self.controller.committed(state, state.decision, arm, [0] * tokens, rows)
        return arm

    def rounds(self, count: int) -> Counter[str]:
        return Counter(self.round() for _ in range(count))

    def prices(self, requests: int = 1) -> dict[str, float]:
        return {arm: self.costs.draft(arm, requests) for arm in ("ar", "diffusion")}


@pytest.mark.parametrize("seed", sampled(range(5), 0))
@pytest.mark.parametrize("stall", ["draft", "verify", "catch_up", "gap"])
@pytest.mark.parametrize("before", [0, 1, 200])
def test_ten_seconds_once(stall: str, before: int, seed: int) -> None:
    """In the first round, the second, or after hundreds: the better arm is back within fifty rounds."""
    machine = Machine(seed=seed).profiled()
    machine.rounds(before)
    machine.round(stall)
    machine.rounds(50)
    assert machine.rounds(300)["ar"] >= 290
    assert machine.costs.worth("ar").draft == pytest.approx(settled_worth(seed), rel=0.5)


def settled_worth(seed: int) -> float:
    """Tokens that a further pass of EAGLE-3 must bring if nothing was slow."""
    machine = Machine(seed=seed).profiled()
    machine.rounds(400)
    return machine.costs.worth("ar").draft


@pytest.mark.parametrize("seed", sampled(range(5), 0))
def test_ten_seconds_at_the_start_of_an_arm(seed: int) -> None:
    """Without a profile, and in the arm's very first draft."""
    machine = Machine(seed=seed)
    while machine.round("draft") != "ar":
        pass
    machine.rounds(100)
    assert machine.rounds(300)["ar"] >= 280


@pytest.mark.parametrize("seed", sampled(range(5), 0))
@pytest.mark.parametrize("stall", ["look", "verify", "gap"])
@pytest.mark.parametrize("before", [0, 5, 200])
def test_ten_seconds_of_a_copy(before: int, stall: str, seed: int) -> None:
    """Nothing that a copy takes is its own price, so nothing can make it look dear: it needs no probe."""
    machine = Machine(seed=seed)
    machine.copies = Forecast(9.0, 9)
    machine.rounds(before)
    while machine.round(stall) != "lookup":
        pass
    machine.rounds(50)
    assert machine.rounds(300)["lookup"] >= 290
    assert machine.costs.draft("lookup", 1) == 0
    assert machine.costs.timings("lookup") == 0


@pytest.mark.parametrize("seed", sampled(range(5), 0))
def test_copies_that_bring_little_are_never_tried(seed: int) -> None:
    """Thousands of rounds, more than between two probes: what they would have brought is known from each of them."""
    machine = Machine(seed=seed).profiled()
    machine.copies = Forecast(1.2, 12)
    assert machine.rounds(3_000)["lookup"] == 0
    machine.copies = Forecast(9.0, 12)
    assert machine.rounds(20)["lookup"] >= 18, "the first round that promises much is theirs"


@pytest.mark.parametrize("seed", sampled(range(5), 0))
@pytest.mark.parametrize("longest", [0, 300])
def test_a_short_copy_is_priced_by_its_own_rows(longest: int, seed: int) -> None:
    """Before any copy, and after hundreds of the widest: three tokens in four rows beat three in six and a draft."""
    machine = Machine(seed=seed).profiled()
    machine.copies = Forecast(9.0, 17)
    machine.rounds(longest)
    machine.copies = Forecast(2.9, 4)
    assert machine.rounds(300)["lookup"] >= 285


@pytest.mark.parametrize("seed", sampled(range(5), 0))
@pytest.mark.parametrize("factors", [{"ar": 5.0}, {"diffusion": 5.0}, {"ar": 5.0, "diffusion": 5.0}])
def test_a_start_up_on_a_busy_machine(factors: dict[str, float], seed: int) -> None:
    """Sixty rounds later the routes are those of a profile that was right."""
    machine = Machine(seed=seed).profiled(**factors)
    machine.rounds(60)
    assert machine.rounds(300)["ar"] >= 290
    assert machine.prices()["ar"] == pytest.approx(0.006, rel=0.25)


@pytest.mark.parametrize("seed", sampled(range(5), 0))
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_machine_that_stays_slower_or_faster(factor: float, seed: int) -> None:
    machine = Machine(seed=seed).profiled()
    machine.rounds(300)
    machine.slower = factor
    machine.rounds(30)
    assert machine.prices()["ar"] == pytest.approx(0.006 * factor, rel=0.25)
    assert machine.costs.verify(6, 1) == pytest.approx((0.0336 + 0.004) * factor, rel=0.25)
    assert machine.rounds(300)["ar"] >= 280


@pytest.mark.parametrize("seed", sampled(range(5), 0))
def test_a_busy_while_is_forgotten_soon(seed: int) -> None:
    """A hundred rounds in which the drafter took five times as long; then all is as it was."""
    machine = Machine(seed=seed).profiled()
    machine.rounds(300)
    machine.seconds["ar"] = 0.025
    assert machine.rounds(100)["diffusion"] >= 80
    machine.seconds["ar"] = 0.005
    machine.rounds(160)
    assert machine.rounds(300)["ar"] >= 280


@pytest.mark.parametrize("noise", [0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("seed", sampled(range(3), 0))
def test_ordinary_noise_changes_nothing(noise: float, seed: int) -> None:
    """Neither routes that go back and forth, nor probes beyond those that are due."""
    machine = Machine(noise, seed).profiled()
    machine.rounds(1000)
    assert machine.rounds(2000)["ar"] >= (1980 if noise < 0.5 else 1960)
    assert machine.prices()["ar"] == pytest.approx(0.006 * math.exp(noise**2 / 2), rel=0.15 + noise / 4)

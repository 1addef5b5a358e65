"""Measured latencies and expected acceptance."""

import random

import pytest

from whiflash_sglang.routing.costs import Line, MeasuredCosts
from whiflash_sglang.routing.estimate import AcceptanceEstimator, context_of
from whiflash_sglang.routing.mean import Mean
from whiflash_sglang.routing.signals import OpenSpan, Signals

BOTH = frozenset({"ar", "diffusion"})


def test_a_line_finds_intercept_and_slope() -> None:
    rng, line = random.Random(0), Line(0.01, 0.002)
    for _ in range(400):
        x = rng.randrange(1, 40)
        line.add(x, 0.02 + 0.0005 * x + rng.gauss(0, 0.0005))
    assert line.at(1) == pytest.approx(0.0205, abs=0.002)
    assert line.at(40) == pytest.approx(0.040, abs=0.003)


def test_a_line_follows_a_machine_that_slows_down() -> None:
    line = Line(0.0, 0.0)
    for _ in range(300):
        line.add(8, 0.01)
    for _ in range(600):
        line.add(8, 0.03)
    assert line.at(8) == pytest.approx(0.03, rel=0.1)


def test_noise_never_makes_more_work_faster() -> None:
    line = Line(0.0, 0.0)
    for x, y in ((1, 0.03), (2, 0.02), (3, 0.01)) * 20:
        line.add(x, y)
    assert line.at(10) >= line.at(1) > 0


def test_an_untried_drafter_is_free() -> None:
    costs = MeasuredCosts({"ar": 6}.__getitem__)
    assert costs.draft("ar", 4) == 0.0
    costs.drafted("ar", 4, passes=5, seconds=0.007, catch_up=0.001)
    assert costs.draft("ar", 4) == pytest.approx(0.008)


def test_estimates_move_from_the_prior_to_what_was_seen() -> None:
    estimator, signals = AcceptanceEstimator(), Signals(5, BOTH, entropy=0.3)
    before = estimator.expect("ar", signals)
    for _ in range(50):
        estimator.observe("ar", context_of(signals), 4)
    assert before == 2.0
    assert estimator.expect("ar", signals) == pytest.approx(4.0, abs=0.15)


def test_contexts_differ() -> None:
    estimator = AcceptanceEstimator()
    prose, tool = Signals(5, BOTH, entropy=2.0), Signals(5, BOTH, entropy=2.0, span=OpenSpan("tool_call"))
    for _ in range(40):
        estimator.observe("ar", context_of(prose), 1)
        estimator.observe("ar", context_of(tool), 6)
    assert estimator.expect("ar", tool) > estimator.expect("ar", prose) + 3


def test_a_requests_own_rounds_count() -> None:
    estimator = AcceptanceEstimator()
    for _ in range(40):
        estimator.observe("ar", (0, None), 2)
    own = Mean()
    for _ in range(10):
        own.add(6.0, 8.0)
    fresh, known = Signals(5, BOTH, entropy=0.0), Signals(5, BOTH, entropy=0.0, recent={"ar": own})
    assert estimator.expect("ar", known) > estimator.expect("ar", fresh) + 1.5

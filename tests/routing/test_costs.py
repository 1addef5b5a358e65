"""Measured latencies and expected acceptance."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from whiflash_sdk.hints import Span

from whiflash_sglang.drafts.rates import RECENT_ROUNDS, Mean
from whiflash_sglang.prices.costs import PLAIN_ROUNDS, PRIOR_SHARE, MeasuredCosts, verification, work_of
from whiflash_sglang.prices.fits import Fit
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.records.signals import Decision, Signals
from whiflash_sglang.round.learning import Learner
from whiflash_sglang.routing.estimate import LEVEL_LIMIT, AcceptanceByPlace, AcceptanceEstimator
from whiflash_sglang.telemetry.tally import Tally

BOTH = frozenset({"ar", "diffusion"})


def test_a_fit_of_one_kind_finds_intercept_and_slope() -> None:
    rng, line = random.Random(0), Fit(lambda _: (0.002,))
    for _ in range(400):
        x = rng.randrange(1, 40)
        line.add((x,), 0.02 + 0.0005 * x + rng.gauss(0, 0.0005))
    assert line.at((1,)) == pytest.approx(0.0205, abs=0.002)
    assert line.at((40,)) == pytest.approx(0.040, abs=0.003)


def added(fit: Fit, drafts: int, requests: int, seconds: float) -> None:
    fit.add(work_of(requests + drafts, requests), seconds)


def at(fit: Fit, drafts: int, requests: int) -> float:
    return fit.at(work_of(requests + drafts, requests))


def busy_server(rounds: int, requests: list[int], seed: int = 0) -> Fit:
    """Verifications that take 30 ms, 4 ms a request and 2 ms a draft; who serves more requests verifies more drafts."""
    rng, fit = random.Random(seed), verification()
    for _ in range(rounds):
        count = rng.choice(requests)
        drafts = sum(rng.choice([0, 1, 1, 5]) for _ in range(count))
        added(fit, drafts, count, 0.030 + 0.004 * count + 0.002 * drafts + rng.gauss(0, 0.002))
    return fit


def test_a_draft_is_not_charged_for_the_requests_beside_it() -> None:
    fit = busy_server(600, [1, 2, 4, 8])
    assert fit.slopes[:2] == pytest.approx((0.002, 0.004), rel=0.15)
    assert at(fit, 0, 8) == pytest.approx(0.062, rel=0.05)
    assert at(fit, 24, 8) == pytest.approx(0.110, rel=0.05)


def test_what_never_differed_keeps_its_prior() -> None:
    draft, request, _ = busy_server(600, [1]).slopes
    assert draft == pytest.approx(0.002, rel=0.15)
    assert request == pytest.approx(PRIOR_SHARE * 0.0375, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_noise_never_makes_more_work_faster(seed: int) -> None:
    rng, fit = random.Random(seed), verification()
    for _ in range(300):
        drafts, requests = rng.randrange(20), rng.randrange(1, 9)
        seconds = max(0.001, 0.05 - 0.001 * drafts - 0.002 * requests + rng.gauss(0, 0.01))
        added(fit, drafts, requests, seconds)
    assert min(fit.slopes) >= 0
    assert at(fit, 20, 8) >= at(fit, 0, 1) > 0


def test_a_busy_server_that_drafts_less_does_not_make_drafts_free() -> None:
    """Alone both slopes would be negative here; of the planes that do not fall the best one has dear drafts."""
    fit = verification()
    for drafts, requests, seconds in ((0, 8, 0.040), (20, 1, 0.060), (20, 8, 0.035)) * 100:
        added(fit, drafts, requests, seconds)
    draft, request, _ = fit.slopes
    assert draft == pytest.approx(0.00037, abs=0.0001)
    assert request == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_second_row_may_cost_more_than_all_behind_it(seed: int) -> None:
    """In float32 on two cores a round of one row took 77 ms, one of two to eight rows some 125. On one line through
    both a draft cost 5 ms, so copies of which one in twelve was right looked worth it.
    """
    rng, fit = random.Random(seed), verification()
    for _ in range(60):
        drafts = rng.choice([0, 0, 0, 1, 2, 4, 8])
        added(fit, drafts, 1, (0.077 if not drafts else 0.124 + 0.001 * drafts) * rng.lognormvariate(0, 0.08))
    assert at(fit, 0, 1) == pytest.approx(0.077, rel=0.06)
    assert at(fit, 1, 1) == pytest.approx(0.125, rel=0.08)
    for _ in range(1000):  # what was seen long ago is forgotten, so that drafts are tried again
        added(fit, 0, 1, 0.077)
    assert at(fit, 1, 1) < 0.095


def test_a_small_step_is_none() -> None:
    """Packed bfloat16 weights: seven rows take as long as one, more take longer."""
    rng, fit = random.Random(0), verification()
    for _ in range(300):
        drafts = rng.choice([0, 1, 3, 5, 8, 16])
        added(fit, drafts, 1, 0.035 + 0.0004 * drafts + 0.003 * (drafts > 0) + rng.gauss(0, 0.001))
    assert fit.slopes[2] == 0.0


def test_a_verification_before_and_after_its_first_round() -> None:
    fit = verification()
    assert at(fit, 0, 1) == 0.02
    assert at(fit, 5, 3) == pytest.approx(0.02 * (1 + 7 * PRIOR_SHARE))
    added(fit, 5, 3, 0.05)
    assert at(fit, 5, 3) == pytest.approx(0.05)
    assert at(fit, 0, 1) == pytest.approx(0.05 * (1 - 7 * PRIOR_SHARE))


def test_what_the_engine_takes_between_rounds_is_charged_to_all_alike() -> None:
    """Rounds without drafts share its steps; by the round, the gap would make every draft dearer."""
    costs = MeasuredCosts({"ar": 4}.__getitem__)
    for _ in range(50):
        costs.observe(RoundTime(4, 1, tokens=2, seconds=0.023, gap=0.004))
        costs.observe(RoundTime(1, 1, tokens=1, seconds=0.020))
    assert costs.verify(4, 1) - costs.verify(1, 1) == pytest.approx(0.003, rel=0.05)
    assert costs.verify(1, 1) == pytest.approx(0.022, rel=0.02)


def test_an_untried_drafter_is_free() -> None:
    costs = MeasuredCosts({"ar": 6}.__getitem__)
    assert costs.draft("ar", 4) == 0.0
    costs.drafted("ar", 4, 5, 0.007, 0.001)
    assert costs.draft("ar", 4) == pytest.approx(0.008)


def test_estimates_move_from_the_prior_to_what_was_seen() -> None:
    estimator, signals = AcceptanceEstimator(), Signals(allowed=BOTH, entropy=0.3)
    before = estimator.expect("ar", signals)
    for _ in range(50):
        estimator.observe("ar", signals, 4)
    assert before == 2.0
    assert estimator.expect("ar", signals) == pytest.approx(4.0, abs=0.15)


def test_a_measured_acceptance_is_believed_for_longer_than_a_guess() -> None:
    """Two rounds of bad luck in a row leave a drafter its lead."""
    estimator, recent = (
        AcceptanceEstimator(measured={"ar": 4.0}),
        {"ar": Mean(2.0, 2.0), "diffusion": Mean(2.0, 2.0)},
    )
    signals = Signals(allowed=BOTH, recent=recent)
    assert [estimator.usual(arm) for arm in ("ar", "diffusion")] == [4.0, 2.0]
    for arm in sorted(BOTH):
        for _ in range(2):
            estimator.observe(arm, Decision(), 1)
    assert estimator.expect("ar", signals) > 2.8
    assert estimator.expect("diffusion", signals) < 1.5


def test_predictions_are_brought_to_the_level_of_what_is_accepted() -> None:
    """Drafts are cut where rows are dear, so that full-length predictions are too high for every request."""
    estimator = AcceptanceEstimator()
    cut, lower = (
        Signals(allowed=BOTH, predicted={"ar": length, "diffusion": length}) for length in (4.0, 2.0)
    )
    assert estimator.expect("ar", cut) == 4.0
    for _ in range(200):
        estimator.observe("ar", cut, 2)
    assert estimator.expect("ar", cut) == pytest.approx(2.0, abs=0.2)
    assert estimator.expect("ar", lower) == pytest.approx(1.33, abs=0.1)
    assert estimator.expect("diffusion", cut) == 4.0
    for _ in range(200):
        estimator.observe("ar", cut, 4)
    assert estimator.expect("ar", cut) == pytest.approx(4.0, abs=0.3), "the busy time is forgotten"


def test_a_text_that_copies_well_does_not_raise_predictions_for_all() -> None:
    estimator, signals = AcceptanceEstimator(), Signals(allowed=BOTH, predicted={"ar": 3.0})
    for _ in range(200):
        estimator.observe("ar", signals, 20)
    assert estimator.expect("ar", signals) == 1 + 2 * LEVEL_LIMIT


@pytest.mark.parametrize(("differ", "expected"), [(False, 2.0), (True, 1.3)])
def test_a_requests_own_rounds_count_as_far_as_requests_differ(differ: bool, expected: float) -> None:
    """If one is like another, eight rounds without an accepted draft are bad luck."""
    estimator, rng = AcceptanceEstimator(), random.Random(0)
    for number in range(100):
        recent: dict[str, Mean] = {}
        for _ in range(20):
            length = 1 + 2 * (number % 2 if differ else rng.randrange(2))
            estimator.observe("ar", Decision(recent=recent), length)
            recent.setdefault("ar", Mean()).add(length, RECENT_ROUNDS)
    assert estimator.expect("ar", Signals(recent={"ar": Mean(8.0, 8.0)})) == pytest.approx(expected, abs=0.15)


def test_chances_by_place_begin_as_measured_and_follow_what_is_seen() -> None:
    """A place that no draft has reached is taken for as good as the one before it."""
    places = AcceptanceByPlace({"ar": (0.8, 0.5)})
    assert places.accepted("ar", 3) == pytest.approx(0.8 + 0.4 + 0.2)
    assert places.accepted("ar", 2.5, after=1) == pytest.approx(0.5 + 0.125)
    assert places.accepted("diffusion", 2) == pytest.approx(0.5 + 0.25)
    for _ in range(2000):
        places.observe("ar", 2, 1)
        places.observe("diffusion", 1, 1)
    assert places.accepted("ar", 1) == pytest.approx(1.0, abs=0.01)
    assert places.accepted("ar", 2, after=1) == pytest.approx(0.0, abs=0.02)
    assert places.accepted("diffusion", 4) == pytest.approx(4.0, abs=0.1)


def test_contexts_differ() -> None:
    estimator = AcceptanceEstimator()
    prose, tool = (
        Signals(allowed=BOTH, entropy=2.0),
        Signals(allowed=BOTH, entropy=2.0, span=Span(kind="tool_call", open=True)),
    )
    for _ in range(40):
        estimator.observe("ar", prose, 1)
        estimator.observe("ar", tool, 6)
    assert estimator.expect("ar", tool) > estimator.expect("ar", prose) + 3


def test_what_drafting_brings_is_counted_from_when_plain_decoding_was_timed() -> None:
    costs, tally = MeasuredCosts(lambda arm: 4), Tally.of(["ar"])
    other: Any = SimpleNamespace(costs=costs)
    learner = Learner({}, other, other, tally, other, [])
    drafted = RoundTime(8, 2, tokens=6, seconds=0.02)
    for _ in range(100):
        learner.timed(drafted)
    for rounds in range(PLAIN_ROUNDS):
        assert costs.plain_price() == {"rounds": rounds, "needed": PLAIN_ROUNDS, "of": "plain rounds"}
        assert (costs.plain(2), tally.priced_seconds, tally.priced_tokens, tally.plain_seconds) == (
            None,
            0,
            0,
            0,
        )
        learner.timed(RoundTime(2, 2, tokens=2, seconds=0.01))
    assert tally.priced_tokens == 2, "of the round that made it known"
    before = tally.plain_seconds
    learner.timed(drafted)
    assert (tally.priced_tokens, tally.timed_tokens) == (8, 622)
    assert tally.plain_seconds - before == pytest.approx(3 * (costs.plain(2) or 0))

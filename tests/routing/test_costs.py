"""Expected acceptance, and what drafting brought."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from priced import priced
from whiflash_sdk.hints import Span

from whiflash_sglang.drafts.rates import RECENT_ROUNDS, Mean
from whiflash_sglang.prices.costs import PLAIN_ROUNDS
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.records.signals import Decision, Signals
from whiflash_sglang.round.learning import Learner
from whiflash_sglang.routing.estimate import LEVEL_LIMIT, AcceptanceByPlace, AcceptanceEstimator
from whiflash_sglang.telemetry.tally import Tally

BOTH = frozenset({"ar", "diffusion"})


def test_estimates_move_from_the_prior_to_what_was_seen() -> None:
    estimator, signals = AcceptanceEstimator(), Signals(allowed=BOTH, entropy=0.3)
    before = estimator.expect("ar", signals)
    for _ in range(50):
        estimator.observe("ar", signals, 4)
    assert before == 2.0
    assert estimator.expect("ar", signals) == pytest.approx(4.0, abs=0.15)


def test_a_measured_acceptance_is_believed_for_longer_than_a_guess() -> None:
    """Two rounds of bad luck in a row leave a drafter its lead."""
    estimator, recent = (AcceptanceEstimator(measured={"ar": 4.0}), {"ar": Mean(2.0, 2.0), "diffusion": Mean(2.0, 2.0)})
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
    cut, lower = (Signals(allowed=BOTH, predicted={"ar": length, "diffusion": length}) for length in (4.0, 2.0))
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


def test_what_drafting_brings_is_counted_from_when_plain_decoding_was_priced() -> None:
    costs, tally = priced(lambda arm: 4), Tally.of(["ar"])
    other: Any = SimpleNamespace(costs=costs)
    learner = Learner({}, other, other, tally, other, [])
    drafted = RoundTime(8, 2, tokens=6, seconds=0.04)
    for rounds in range(PLAIN_ROUNDS):
        assert costs.plain_price() == {"rounds": rounds, "needed": PLAIN_ROUNDS}
        unknown = costs.plain(2), tally.priced_seconds, tally.priced_tokens, tally.plain_seconds
        assert unknown == (None, 0, 0, 0)
        learner.timed(drafted)
    assert tally.priced_tokens == 6, "of the round that made it known"
    before = tally.plain_seconds
    learner.timed(drafted)
    assert (tally.priced_tokens, tally.timed_tokens) == (12, 6 * (PLAIN_ROUNDS + 1))
    assert tally.plain_seconds - before == pytest.approx(3 * (costs.plain(2) or 0))

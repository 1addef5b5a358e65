"""Policies judge one request from its signals."""

import math

import pytest

from whiflash_sglang.routing.lane import Lane
from whiflash_sglang.routing.policies import EntropyPolicy, Pinned, RandomPolicy
from whiflash_sglang.routing.signals import OpenSpan, Signals

BOTH = frozenset({"ar", "diffusion"})


def best(scores: dict[str, float]) -> str:
    return max(scores, key=lambda arm: scores[arm])


@pytest.mark.parametrize(
    ("entropy", "arm"), [(0.2, "diffusion"), (1.0, "diffusion"), (1.5, "ar"), (math.nan, "diffusion")]
)
def test_entropy_threshold(entropy: float, arm: str) -> None:
    assert best(EntropyPolicy(tau=1.0).score(Signals(10, BOTH, entropy=entropy))) == arm


def test_entropy_keeps_an_arm_for_its_dwell() -> None:
    policy = EntropyPolicy(tau=1.0, min_dwell=2)
    assert best(policy.score(Signals(10, BOTH, entropy=3.0, previous="diffusion", dwell=1))) == "diffusion"
    assert best(policy.score(Signals(10, BOTH, entropy=3.0, previous="diffusion", dwell=2))) == "ar"


def test_an_open_spans_preference_comes_before_entropy() -> None:
    span = OpenSpan("tool_call", prefer="ar")
    assert best(EntropyPolicy(tau=1.0).score(Signals(10, BOTH, entropy=0.0, span=span))) == "ar"


def test_pinned_falls_back_to_plain_decoding() -> None:
    assert best(Pinned("ar").score(Signals(10, BOTH))) == "ar"
    assert best(Pinned("ar").score(Signals(10, frozenset({"diffusion"})))) == "none"
    assert best(Pinned("none").score(Signals(10, BOTH))) == "none"


def test_random_reaches_every_arm() -> None:
    policy = RandomPolicy(seed=1)
    assert {best(policy.score(Signals(10, BOTH))) for _ in range(200)} == {"ar", "diffusion", "none"}


def test_lane_counts_dwell_and_remembers_acceptance() -> None:
    lane = Lane("r")
    for arm in ("ar", "ar", "diffusion"):
        lane.chose(arm)
    assert (lane.previous, lane.dwell) == ("diffusion", 1)
    lane.committed("diffusion", 4, "entropy")
    lane.committed("diffusion", 2, "entropy")
    assert 2.0 < lane.recent["diffusion"] < 4.0

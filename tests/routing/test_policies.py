"""Policies judge one request from its signals."""

import math

import pytest
from whiflash_sdk.hints import Span

from whiflash_sglang.records.request import Request
from whiflash_sglang.records.signals import Signals
from whiflash_sglang.routing.policies import EntropyPolicy, Pinned, RandomPolicy, apply_hints

BOTH = frozenset({"ar", "diffusion"})


def best(scores: dict[str, float]) -> str:
    return max(scores, key=lambda arm: scores[arm])


@pytest.mark.parametrize(
    ("entropy", "arm"), [(0.2, "diffusion"), (1.0, "diffusion"), (1.5, "ar"), (math.nan, "diffusion")]
)
def test_entropy_threshold(entropy: float, arm: str) -> None:
    scores = EntropyPolicy(tau=1.0).score(Signals(allowed=BOTH, entropy=entropy))
    assert best(scores) == arm
    assert sorted(scores.values())[-1] > sorted(scores.values())[-2], "no tie that the order of names would settle"


def test_entropy_keeps_an_arm_for_its_dwell() -> None:
    policy = EntropyPolicy(tau=1.0, min_dwell=2)
    assert best(policy.score(Signals(allowed=BOTH, entropy=3.0, previous="diffusion", dwell=1))) == "diffusion"
    assert best(policy.score(Signals(allowed=BOTH, entropy=3.0, previous="diffusion", dwell=2))) == "ar"


@pytest.mark.parametrize(
    ("span", "off", "arm", "reason"),
    [
        (None, False, "diffusion", "policy"),
        (Span(kind="tool_call", open=True), False, "diffusion", "policy"),
        (Span(kind="tool_call", open=True, prefer="ar"), False, "ar", "span"),
        (Span(kind="json", open=True, bias={"ar": 3.0}), False, "ar", "span"),
        (Span(kind="json", open=True, bias={"ar": 0.1}), False, "diffusion", "span"),
        (Span(kind="json", open=True, prefer="lookup"), False, "diffusion", "policy"),
        (Span(kind="json", open=True, prefer="none", pin=True), False, "none", "pin"),
        (Span(kind="json", open=True, prefer="lookup", pin=True), False, "diffusion", "policy"),
        (Span(kind="tool_call", open=True, prefer="ar"), True, "none", "off"),
    ],
)
def test_hints_move_scores(span: Span | None, off: bool, arm: str, reason: str) -> None:
    moved, why = apply_hints(EntropyPolicy(tau=1.0).score(Signals(allowed=BOTH, entropy=0.0)), span, BOTH, off=off)
    assert (best(moved), why) == (arm, reason)


def test_pinned_falls_back_to_plain_decoding() -> None:
    """And to a hint's pin."""
    scores = Pinned("ar").score(Signals(allowed=BOTH))
    assert best(scores) == "ar"
    span = Span(kind="json", open=True, prefer="diffusion", pin=True)
    assert best(apply_hints(scores, span, BOTH, off=False)[0]) == "diffusion"
    assert best(Pinned("ar").score(Signals(allowed=frozenset({"diffusion"})))) == "none"
    assert best(Pinned("none").score(Signals(allowed=BOTH))) == "none"


def test_random_reaches_every_arm() -> None:
    policy = RandomPolicy(seed=1)
    assert {best(policy.score(Signals(allowed=BOTH))) for _ in range(200)} == {"ar", "diffusion", "none"}


def test_lane_counts_dwell_and_remembers_acceptance() -> None:
    state = Request("r")
    for arm in ("ar", "ar", "diffusion"):
        state.chose(arm)
    assert (state.previous, state.dwell) == ("diffusion", 1)
    state.committed("diffusion", [1, 2, 3, 4])
    state.committed("diffusion", [1, 2])
    state.foresee({})
    recent = state.recent["diffusion"]
    assert 2.0 < recent.total / recent.weight < 4.0

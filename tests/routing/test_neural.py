"""The neural policy from its signals, and auto with a router's predictions."""

import math

import pytest
from priced import priced

from whiflash_sglang.drafts.rates import Mean
from whiflash_sglang.records.request import Request
from whiflash_sglang.records.signals import Signals
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.estimate import LEVEL_PRIOR
from whiflash_sglang.routing.neural import NeuralPolicy, note
from whiflash_sglang.routing.policies import AutoPolicy

BOTH = frozenset({"ar", "diffusion"})


def best(policy: NeuralPolicy, **known: object) -> str:
    scores = policy.score(Signals(allowed=BOTH, **known))  # type: ignore[arg-type]
    return max(scores, key=lambda arm: scores[arm])


@pytest.mark.parametrize(
    ("delta", "threshold", "arm"),
    [
        (0.6, 0.5, "ar"),
        (0.5, 0.5, "diffusion"),
        (-0.1, -0.2, "ar"),
        (math.nan, 0.5, "diffusion"),
        (math.nan, -0.5, "ar"),
    ],
)
def test_threshold(delta: float, threshold: float, arm: str) -> None:
    assert best(NeuralPolicy(threshold), delta=delta) == arm


def test_dwell_keeps_an_arm() -> None:
    policy = NeuralPolicy(0.0, min_dwell=3)
    assert best(policy, delta=1.0, previous="diffusion", dwell=2) == "diffusion"
    assert best(policy, delta=1.0, previous="diffusion", dwell=3) == "ar"


def test_an_arm_that_may_not_draft_is_not_offered() -> None:
    assert NeuralPolicy(0.0).score(Signals(allowed=frozenset({"ar"}), delta=-1.0)).keys() == {"ar", "none"}


def test_a_routers_outputs_reach_the_policy() -> None:
    state = Request("r")
    note(state, [0.25, 1.5, -0.1])
    assert state.delta == 0.25
    assert state.predicted == {"ar": 2.5, "diffusion": 1.0}
    note(state, [0.5])
    assert state.predicted == {}
    assert state.delta == 0.5


def test_auto_believes_the_heads_and_recent_rounds_correct_them() -> None:
    policy = AutoPolicy(heads=True)
    assert "delta" in policy.needs
    assert "delta" not in AutoPolicy().needs
    for _ in range(50):
        policy.observe("ar", Signals(allowed=BOTH), 5)
    predicted = {"ar": 1.5, "diffusion": 3.0}
    scores = policy.score(Signals(allowed=BOTH, predicted=predicted))
    assert scores["ar"] == 1.5
    assert scores["diffusion"] == 3.0
    recent = Mean()
    for _ in range(8):
        recent.add(1.0, 8.0)
    lower = policy.score(Signals(allowed=BOTH, predicted=predicted, recent={"diffusion": recent}))["diffusion"]
    assert 2.0 < lower < 3.0


def test_a_round_is_judged_by_the_predictions_that_it_was_decided_on() -> None:
    policy = AutoPolicy(heads=True)
    controller = Controller(policy, priced(lambda arm: 6), ())
    controller.open(Request("r"), [])
    note(controller.states[0], [0.0, 3.0, 1.0])
    controller.route([controller.states[0]], [dict.fromkeys(BOTH)])
    note(controller.states[0], [0.0, 9.0, 9.0])  # of the round's end, before it is learned from
    state = controller.states[0]
    controller.committed(state, state.decision, "ar", [5, 6], 6)
    level = (1 + LEVEL_PRIOR) / (3 + LEVEL_PRIOR)
    assert policy.estimator.expect("ar", Signals(allowed=BOTH, predicted={"ar": 5.0})) == pytest.approx(1 + 4 * level)

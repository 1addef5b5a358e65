"""What a plan tells the device of copies, where the device copies too."""

from typing import Any

import pytest
from loaded_scripts import load_script

from whiflash_sglang import arms
from whiflash_sglang.round.plan import Plan
from whiflash_sglang.round.planning import Planner
from whiflash_sglang.spans.hints import RequestHints

ROUNDS = 3


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Those that are made from now on."""
    made, plan = list[Plan](), Planner.plan

    def noting(self: Planner, requests: Any) -> Plan:
        made.append(plan(self, requests))
        return made[-1]

    monkeypatch.setattr(Planner, "plan", noting)
    return made


def test_what_the_device_copies_itself_is_not_sent(plans: list[Plan]) -> None:
    batch = load_script("planning_time").Batch(3)
    for _ in range(ROUNDS):
        batch.round()
    for plan in plans:
        assert all(plan.copying)
        assert not any(plan.voices)
        assert plan.on_device.from_host is None
        # The host looks all the same, to know whether a draft is worth its time.
        assert all(decision.signals.expected[arms.LOOKUP].length > 1 for decision in plan.decisions)


def test_what_the_device_cannot_find_is_sent(plans: list[Plan]) -> None:
    batch = load_script("planning_time").Batch(3)
    row, text = 2, batch.requests[1]
    predicted = list(range(500, 520))
    batch.drafters[arms.LOOKUP].begin(row, RequestHints(), None, predicted, prompt=len(text.origin_input_ids))
    text.output_ids = predicted[:1]
    batch.round()
    (plan,) = plans
    assert [list(own) for own in plan.voices] == [[], [arms.LOOKUP], []]
    voice, sent = plan.voices[1][arms.LOOKUP], plan.on_device.from_host
    assert {part.source for part in voice.parts} == {"prediction"}
    assert sent is not None
    count = len(voice.tokens)
    assert sent.counts.flatten().tolist() == [0, count, 0]
    assert sent.tokens[1, 0, :count].tolist() == list(voice.tokens) == predicted[1 : 1 + count]
    assert sent.alive[1, 0, :count].tolist() == pytest.approx(voice.alive)

"""Whom the controller asks before it routes."""

import pytest

from whiflash_sglang import arms
from whiflash_sglang.lab.policies import CopyRule, RandomPolicy
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.costs import MeasuredCosts
from whiflash_sglang.routing.policies import AutoPolicy, EntropyPolicy, Pinned, Policy
from whiflash_sglang.routing.request_state import RequestState
from whiflash_sglang.spans.hints import RequestHints, SpanHint

EVERY = {arms.AR, arms.DIFFUSION, arms.LOOKUP}
ROW = 3


def asked(policy: Policy, hints: RequestHints) -> set[str]:
    """The drafting arms that the request is asked about, in the middle of its output."""
    controller = Controller(policy, MeasuredCosts(lambda arm: 4), [b"a", b"b"])
    controller.open(ROW, "r", hints, [0, 1])
    return {arm for arm in EVERY if controller.may_name(ROW, arm)}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (AutoPolicy(), EVERY),
        (RandomPolicy(), EVERY),
        (Pinned(arms.NONE), set()),
        (Pinned(arms.AR), {arms.AR}),
        (CopyRule(), {arms.LOOKUP, arms.AR}),
        (EntropyPolicy(tau=1.0), {arms.AR, arms.DIFFUSION}),
    ],
    ids=lambda p: getattr(p, "name", None),
)
def test_only_arms_that_the_policy_may_name(policy: Policy, expected: set[str]) -> None:
    assert asked(policy, RequestHints()) == expected
    assert asked(policy, RequestHints(off=True)) == set()


def test_a_pin_asks_for_its_arm_under_any_policy() -> None:
    """A preference moves only what the policy offers; a pin decides whatever the policy says."""
    pinned = SpanHint(kind="json", open=True, prefer=arms.LOOKUP, pin=True)
    preferred = SpanHint(kind="json", open=True, prefer=arms.LOOKUP)
    assert asked(Pinned(arms.AR), RequestHints(spans=(pinned,))) == {arms.AR, arms.LOOKUP}
    assert asked(Pinned(arms.AR), RequestHints(spans=(preferred,))) == {arms.AR}


@pytest.mark.parametrize(
    ("policy", "hints", "expected"),
    [
        (AutoPolicy(), RequestHints(), True),
        (AutoPolicy(), RequestHints(off=True), False),
        (AutoPolicy(), RequestHints(spans=(SpanHint("json", open=True, prefer=arms.AR, pin=True),)), False),
        (CopyRule(), RequestHints(), False),
        (RandomPolicy(), RequestHints(), False),
        (EntropyPolicy(tau=1.0), RequestHints(), False),
    ],
    ids=["priced", "off", "pinned-elsewhere", "rule", "drawn", "never-named"],
)
def test_what_may_take_the_place_of_drafts(policy: Policy, hints: RequestHints, expected: bool) -> None:
    """What is said by the arm that the request was routed to, and by others where they are weighed against drafts."""
    controller = Controller(policy, MeasuredCosts(lambda arm: 4), [b"a", b"b"])
    controller.open(ROW, "r", hints, [0, 1])
    [route] = controller.route([ROW], [{arms.AR: None, arms.DIFFUSION: None}])
    assert controller.takes(ROW, route, arms.LOOKUP) == expected
    routed = policy.candidates is None or arms.LOOKUP in policy.candidates
    assert controller.takes(ROW, arms.LOOKUP, arms.LOOKUP) == (routed and not hints.off)


def test_what_the_prefill_sampled_is_followed_before_what_rounds_commit() -> None:
    """As soon as it is known, and once; after a retraction the prefill has sampled another one."""
    hints = RequestHints(spans=(SpanHint("tool_call", "<c>", "</c>"),))
    controller = Controller(RandomPolicy(), MeasuredCosts(lambda arm: 4), [b"<c", b">", b"x"])

    def kind(state: RequestState) -> str | None:
        return state.span.kind if state.span else None

    for before in ([], [2, 2]):
        known = list(before)
        controller.open(ROW, "r", hints, before)
        state = controller.states[ROW]
        state.begin(lambda start, known=known: known[start:])  # type: ignore[misc]
        for token in (0, 1):
            known.append(token)
            for _ in range(2):
                state.begin(lambda start, known=known: known[start:])  # type: ignore[misc]
            if token:
                state.committed("ar", [token])
            assert kind(state) == (None, "tool_call")[token]
    controller.open(ROW, "r", hints, [])
    state = controller.states[ROW]
    state.committed("ar", [1, 2])
    state.begin(lambda start: [0, 1, 2, 1][start:])
    assert state.tracker is not None
    assert state.tracker.length == 2, (
        "a round was learned first, so what it began behind has no place any more"
    )


def test_dwell_counts_the_rounds_of_an_arm_in_a_row() -> None:
    state = RequestState("r")
    found = []
    for arm in ("ar", "ar", "ar", "none", "ar"):
        state.chose(arm)
        found.append(state.dwell)
    assert found == [1, 2, 3, 1, 1]

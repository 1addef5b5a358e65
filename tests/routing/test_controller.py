"""Whom the controller asks before it routes."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
from priced import priced
from whiflash_sdk.hints import Span

from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import Forecast
from whiflash_sglang.prices.round_clock import RoundClock, RoundTime
from whiflash_sglang.records.core import Results
from whiflash_sglang.records.request import Request
from whiflash_sglang.records.signals import Decision
from whiflash_sglang.round.learning import Learner
from whiflash_sglang.routing import controller as routes
from whiflash_sglang.routing.controller import Controller, _of_passes
from whiflash_sglang.routing.policies import AutoPolicy, EntropyPolicy, Pinned, Policy, RandomPolicy
from whiflash_sglang.spans.hints import RequestHints

EVERY = {arms.AR, arms.DIFFUSION, arms.LOOKUP}
ROW = 3


def asked(policy: Policy, hints: RequestHints) -> set[str]:
    """The drafting arms that the request is asked about, in the middle of its output."""
    controller = opened(policy, hints)
    return {*controller.named(controller.states[ROW], EVERY)}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (AutoPolicy(), EVERY),
        (RandomPolicy(), EVERY),
        (Pinned(arms.NONE), set()),
        (Pinned(arms.AR), {arms.AR}),
        (EntropyPolicy(tau=1.0), {arms.AR, arms.DIFFUSION}),
    ],
    ids=lambda p: getattr(p, "name", None),
)
def test_only_arms_that_the_policy_may_name(policy: Policy, expected: set[str]) -> None:
    assert asked(policy, RequestHints()) == expected
    assert asked(policy, RequestHints(off=True)) == set()


def test_a_pin_asks_for_its_arm_under_any_policy() -> None:
    """A preference moves only what the policy offers; a pin decides whatever the policy says."""
    pinned = Span(kind="json", open=True, prefer=arms.LOOKUP, pin=True)
    preferred = Span(kind="json", open=True, prefer=arms.LOOKUP)
    assert asked(Pinned(arms.AR), RequestHints(spans=(pinned,))) == {arms.AR, arms.LOOKUP}
    assert asked(Pinned(arms.AR), RequestHints(spans=(preferred,))) == {arms.AR}


@pytest.mark.parametrize(
    ("policy", "hints", "expected"),
    [
        (AutoPolicy(), RequestHints(), True),
        (AutoPolicy(), RequestHints(off=True), False),
        (AutoPolicy(), RequestHints(spans=(Span(kind="json", open=True, prefer=arms.AR, pin=True),)), False),
        (RandomPolicy(), RequestHints(), True),
        (EntropyPolicy(tau=1.0), RequestHints(), False),
        (Pinned(arms.NONE), RequestHints(), False),
    ],
    ids=["priced", "off", "pinned-elsewhere", "drawn", "never-named", "plain"],
)
def test_whose_candidates_may_be_verified_beside_a_pass(policy: Policy, hints: RequestHints, expected: bool) -> None:
    """Every draft source where arms are joined; else it alone, where there is no pass."""
    controller = opened(policy, hints)
    controller.route([controller.states[ROW]], [{arms.AR: None, arms.DIFFUSION: None}])
    assert may_use(controller, arms.LOOKUP) == expected


def may_use(controller: Controller, arm: str) -> bool:
    """Whether the row's request may be asked for the arm's candidates, and may verify them."""
    request = controller.states[ROW]
    return bool(controller.named(request, (arm,))) and request.may_verify(arm)


def opened(policy: Policy, hints: RequestHints) -> Controller:
    """With one request, in the middle of its output."""
    controller = Controller(policy, priced(lambda arm: 4), [b"a", b"b"])
    controller.open(Request("r", hints, ROW), [0, 1])
    return controller


LONG = Forecast(9.0, 9)
EXPECTED = {arms.AR: None, arms.LOOKUP: LONG, arms.STRUCTURE: Forecast(2.0, 2)}


@pytest.mark.parametrize(
    ("policy", "span", "usable"),
    [
        (Pinned(arms.LOOKUP), {}, {arms.LOOKUP}),
        (AutoPolicy(), {}, {arms.LOOKUP, arms.STRUCTURE}),
        (AutoPolicy(), {"prefer": arms.LOOKUP, "pin": True}, {arms.LOOKUP}),
        (AutoPolicy(), {"prefer": arms.NONE, "pin": True}, set()),
        (AutoPolicy(), {"bias": {arms.NONE: 16.0}}, set()),
        (AutoPolicy(), {"bias": {arms.STRUCTURE: 16.0}}, {arms.LOOKUP, arms.STRUCTURE}),
    ],
    ids=["pinned-policy", "auto", "pin", "pinned-plain", "plain-wished", "wished"],
)
def test_whose_candidates_may_be_verified_without_a_pass(
    policy: Policy, span: dict[str, Any], usable: set[str]
) -> None:
    """A pin or a policy that joins nothing keeps to one draft source, and who wants plain decoding to none."""
    controller = opened(policy, RequestHints(spans=(Span(kind="json", open=True, **span),)))
    asked = {arm: EXPECTED[arm] for arm in controller.named(controller.states[ROW], EXPECTED)}
    assert controller.route([controller.states[ROW]], [asked]) == [arms.NONE]
    assert {arm for arm in (arms.LOOKUP, arms.STRUCTURE) if may_use(controller, arm)} == usable
    assert controller.states[ROW].decision.promised == bool(usable)


def test_a_request_without_a_pass_is_worth_its_best_candidate() -> None:
    controller = opened(AutoPolicy(), RequestHints())
    with patch.object(routes, "assign", wraps=routes.assign) as priced:
        assert controller.route([controller.states[ROW]], [EXPECTED]) == [arms.NONE]
    assert priced.call_args.args[0][0][arms.PROMISED] == LONG.length
    short = {**EXPECTED, arms.LOOKUP: Forecast(1.1, 2), arms.STRUCTURE: Forecast(1.05, 2)}
    assert controller.route([controller.states[ROW]], [short]) == [arms.AR]
    assert controller.states[ROW].may_join


@pytest.mark.parametrize("arm", [arms.LOOKUP, arms.STRUCTURE, arms.AR])
def test_a_bias_is_no_token_that_a_round_promises(arm: str) -> None:
    """Neither of an arm with a pass nor of a draft source: others would be weighed against tokens that nobody gets."""
    span = Span(kind="json", open=True, bias={arm: 16.0})
    controller = opened(AutoPolicy(), RequestHints(spans=(span,)))
    sources = {arms.LOOKUP: Forecast(3.0, 3), arms.STRUCTURE: Forecast(2.0, 2)}
    asked = {arms.AR: None, **sources}
    other = Request("r")
    other.foresee(asked)
    plain = AutoPolicy().score(other)
    with patch.object(routes, "assign", wraps=routes.assign) as priced:
        assert controller.route([controller.states[ROW]], [asked]) == [arms.AR if arm == arms.AR else arms.NONE]
    expected = sources[arm].length if arm in sources else plain[arm]
    assert priced.call_args.args[0] == [{arms.AR if arm == arms.AR else arms.PROMISED: pytest.approx(expected)}]


def test_what_the_prefill_sampled_is_followed_before_what_rounds_commit() -> None:
    """As soon as it is known, and once; after a retraction the prefill has sampled another one."""
    hints = RequestHints(spans=(Span(kind="tool_call", begin="<c>", end="</c>"),))
    controller = Controller(RandomPolicy(), priced(lambda arm: 4), [b"<c", b">", b"x"])
    for before in ([], [2, 2]):
        known = list(before)
        controller.open(Request("r", hints, ROW), before)
        state = controller.states[ROW]
        state.begin(lambda start, known=known: known[start:])  # type: ignore[misc]
        for token in (0, 1):
            known.append(token)
            for _ in range(2):
                state.begin(lambda start, known=known: known[start:])  # type: ignore[misc]
            if token:
                state.committed("ar", [token])
            assert (state.span.kind if state.span else None) == (None, "tool_call")[token]


@pytest.mark.parametrize(("kept", "judged"), [(6, (5, 5)), (3, (3, 3))])
def test_a_late_round_is_learned_whole(kept: int, judged: tuple[int, int]) -> None:
    """Another request's prefill came first, so the host had planned this round alone before it knew a token. The
    scheduler kept the run up to a stop string."""
    policy, drafts = AutoPolicy(), [1, 2, 2, 2, 2]
    controller = Controller(policy, priced(lambda arm: 4), [b"<c", b">", b"x"])
    controller.open(Request("r", RequestHints(spans=(Span(kind="tool_call", begin="<c>", end="</c>"),)), ROW), [])
    state, other = controller.states[ROW], MagicMock()
    state.under_way.append(6)
    run = [*drafts, 2][:kept]
    round_: Any = SimpleNamespace(
        requests=[state],
        decisions=[Decision(limit=5)],
        plan=SimpleNamespace(routes=["ar"], limits=SimpleNamespace(passes=[True])),
        answer=lambda i, start: [0, *run][start:],
        time=RoundTime(6, 1),
    )
    results = Results(*[None] * 12)._replace(
        starts=[9], widths=[6], faults=[0], first_drafts=[5], source=[0], drafts=[drafts], drafted=[5]
    )
    learner = Learner({}, controller, RoundClock(), other, other, ("",))
    with patch.object(policy, "judge") as judge:
        learner.learn(round_, results._replace(accept_lens=[6]), kept=[run])
    assert judge.call_args.args == ("ar", *judged)
    assert state.span is not None, "the prefill's token opened it"


def test_what_promises_less_than_plain_decoding_is_no_choice() -> None:
    scores, passes = {"ar": 2.0, "lookup": 0.9, "none": 1.0}, {"ar": 2.0, "none": 1.0}
    assert _of_passes(scores, {"lookup": Forecast(0.9, 3)}, priced=True) == (passes, "none")
    promised = {**passes, "promised": 1.5}
    assert _of_passes({**scores, "lookup": 1.5}, {"lookup": Forecast(1.5, 3)}, priced=True) == (promised, "lookup")

"""Gains of hints and losses of wrong ones: the real controller on simulated acceptance, seeded.

A request is a script of prose and tool calls; an arm's accepted tokens are drawn with a mean of the piece's own. The
machine is like the embedded one: a verification of one row takes 22 ms and 0.6 ms more for every other row.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from matrix import sampled
from priced import priced
from whiflash_sdk.hints import Span

from whiflash_sglang.drafts.rates import Mean
from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.records.request import Request
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.policies import PREFERENCE, RANKS, AutoPolicy, apply_hints
from whiflash_sglang.spans.hints import RequestHints

VOCABULARY = (b"x", b"<t>", b"</t>")
ENTROPIES = (0.0, 0.0, 0.3, 1.0)  # nats; the same in both, as agents' outputs were found to be


WIDTHS = {"ar": 6, "diffusion": 8, "lookup": 6, "none": 1}


def machine() -> Costs:
    """Prices of passes that any number of requests share, and of verifications."""
    return priced(WIDTHS.__getitem__, {"ar": 0.006, "diffusion": 0.004}, base=0.022, more=0.0)


@dataclass(frozen=True)
class World:
    """Mean acceptance lengths by arm, in each kind of piece."""

    prose: Mapping[str, float]
    tool: Mapping[str, float]

    def accepted(self, rng: random.Random, piece: str, arm: str) -> int:
        mean = getattr(self, piece).get(arm, 1.0)
        length = 1
        while length < WIDTHS[arm] and rng.random() < 1 - 1 / mean:
            length += 1
        return length


DIFFERENT = World({"ar": 2.4, "diffusion": 1.5, "lookup": 1.3}, {"ar": 1.6, "diffusion": 2.5, "lookup": 4.5})
ALIKE = World(*({"ar": 1.5, "diffusion": 1.6, "lookup": 1.6},) * 2)
TOOL = Span(kind="tool_call", begin="<t>", end="</t>")


def tokens_per_second(world: World, hints: RequestHints, *, seed: int, requests: int = 20, warm: int = 0) -> float:
    """Rate of `requests` answers with `hints`, after `warm` with none."""
    rng, costs = random.Random(seed), machine()
    controller = Controller(AutoPolicy(), costs, VOCABULARY)
    tokens, seconds = 0, 0.0
    for number in range(warm + requests):
        own = hints if number >= warm else RequestHints(spans=(TOOL,) if hints.spans else ())
        controller.open(Request(str(number), own), ())
        for piece, length in (("prose", 40), ("tool", 30)) * 2:
            state = controller.states[0]
            controller.committed(state, state.decision, "none", [1 if piece == "tool" else 2], 1)
            left = length
            while left > 0:
                controller.states[0].entropy = rng.choice(ENTROPIES)
                (arm,) = controller.route([controller.states[0]], [dict.fromkeys(world.prose)])
                accepted = world.accepted(rng, piece, arm)
                state = controller.states[0]
                controller.committed(state, state.decision, arm, [0] * accepted, WIDTHS[arm])
                left -= accepted
                if number >= warm:
                    tokens += accepted
                    seconds += costs.verify(costs.width(arm), 1) + costs.draft(arm, 1)
        controller.close(controller.states[0])
    return tokens / seconds


RATES: dict[str, float] = {}


def gain(world: World, on: RequestHints, off: RequestHints, **run: int) -> float:
    """Mean over seeds of one rate over the other, less one."""
    keys = {repr((world, hints, run)): hints for hints in (on, off)}
    for key in keys.keys() - RATES.keys():
        RATES[key] = sum(tokens_per_second(world, keys[key], seed=seed, **run) for seed in range(6))
    return RATES[repr((world, on, run))] / RATES[repr((world, off, run))] - 1


SPANS, NO_SPANS = RequestHints(spans=(TOOL,)), RequestHints()


def preferring(arm: str, *, pin: bool = False) -> RequestHints:
    return RequestHints(spans=(Span(kind="tool_call", begin="<t>", end="</t>", prefer=arm, pin=pin),))


def test_spans_help_where_drafters_differ_between_them() -> None:
    assert gain(DIFFERENT, SPANS, NO_SPANS) > 0.10


def test_spans_cost_next_to_nothing_where_drafters_do_not_differ() -> None:
    assert gain(ALIKE, SPANS, NO_SPANS, requests=40) > -0.02


WORLDS = {"different": DIFFERENT, "alike": ALIKE}


@pytest.mark.parametrize("world", sampled(WORLDS, "different"))
@pytest.mark.parametrize("arm", sampled(["ar", "diffusion"], "diffusion"))
def test_measurement_overrules_a_wrong_preference(world: str, arm: str) -> None:
    assert gain(WORLDS[world], preferring(arm), SPANS, warm=20) > -0.06


def test_a_pin_is_not_overruled() -> None:
    assert gain(DIFFERENT, preferring("ar", pin=True), SPANS, warm=20) < -0.15


def test_a_right_preference_costs_nothing_and_is_not_needed_for_long() -> None:
    assert gain(DIFFERENT, preferring("lookup"), SPANS, requests=3) > -0.01
    assert abs(gain(DIFFERENT, preferring("lookup"), SPANS, warm=20)) < 0.03


def test_a_preference_is_one_round_of_belief() -> None:
    span, scores = Span(kind="json", open=True, prefer="ar"), {"ar": 2.0, "none": 1.0}

    def scored(measured: dict[str, Mean] | None) -> float:
        return apply_hints(scores, span, frozenset({"ar"}), off=False, measured=measured)[0]["ar"]

    assert scored({}) == 2.0 + PREFERENCE
    assert scored({"diffusion": Mean(9.0, 3.0)}) == 2.0 + PREFERENCE
    assert scored({"ar": Mean(9.0, 3.0)}) == 2.0 + PREFERENCE / 4
    assert scored(None) == 2.0 + RANKS


def test_the_reason_tells_measurement_from_order() -> None:
    def reason(measured: dict[str, Mean] | None) -> str:
        return apply_hints({"none": 1.0}, None, frozenset(), off=False, measured=measured)[1]

    assert (reason({}), reason(None)) == ("score", "policy")


def test_a_lane_measures_every_kind_of_span_by_itself() -> None:
    controller = Controller(AutoPolicy(), machine(), VOCABULARY)
    controller.open(Request("r", SPANS), ())
    state: Request = controller.states[0]
    state.committed("ar", [0, 0, 0, 1])
    state.foresee({"ar": None})
    assert state.recent == {}
    state.committed("ar", [0, 2])
    state.foresee({"ar": None})
    assert state.recent == {"ar": Mean(4.0, 1.0)}

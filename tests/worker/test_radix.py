"""No slot in the radix tree lacks either drafter's correct KV.

The tree hands a request's slots to later requests, and a hit brings no features to repair anything with. So after
real traffic every slot in the tree is compared with one pass over the sequence it stands for.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from engine import Engine, engine
from matrix import sampled
from model_set import Models
from oracle_arm import OracleArm
from test_constrained import OPTIONS
from test_structure import SCHEMA
from test_structure import requests as structured
from traffic import mixed, play

from whiflash_sglang import lifecycle
from whiflash_sglang.compat.http.streamer import recording_of
from whiflash_sglang.spans.hints import CARRIED_PREDICTION, TOOLS_KEY
from whiflash_sglang.structure.tools import carried_tools

TOLERANCE = 1e-4
"""Of a KV tensor's largest value: the engine's forwards have other shapes than the reference's one pass."""


def sequences(e: Engine) -> list[list[int]]:
    """Every text that the engine has seen: prompts with what was generated after them."""
    return [[*req.origin_input_ids, *req.output_ids] for req in e.requests.values()]


def matched_slots(e: Engine, tokens: Sequence[int]) -> torch.Tensor:
    """KV slots [h] that the tree would hand to a prompt beginning with `tokens`.

    If windowed layers have a pool of their own, also slots that miss the window before them."""
    from array import array

    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    tree = e.scheduler.tree_cache
    key = RadixKey(array("q", tokens), is_bigram=tree.tree_core.is_eagle)
    if ComponentType.SWA in tree.components:
        length, node, _ = tree.tree_core.match_full_device_prefix(key)
    else:
        match = tree.match_prefix(MatchPrefixParams(key=key))
        length, node = match.device_prefix_len, match.last_device_node
    slots: torch.Tensor = tree.path_device_indices(node)[:length]
    return slots.long()


def tree_slots(e: Engine) -> set[int]:
    """Every KV slot that the tree owns."""
    return set(e.scheduler.tree_cache.all_values_flatten().tolist())


def assert_tree_is_true(e: Engine, models: Models) -> int:
    """Compare both drafters' KV at every slot of the tree; returns how many slots there are."""
    checked: set[int] = set()
    for tokens in sequences(e):
        slots = matched_slots(e, tokens)
        if len(slots) == 0:
            continue
        reference = models.reference.keys_values(tokens)
        for arm, expected in reference.items():
            kv = e.worker.drafters[arm].kv
            for name, found, wanted in (("k", kv.k, expected.k), ("v", kv.v, expected.v)):
                close(found[:, slots], wanted[:, : len(slots)], f"{name} of {arm} after {tokens[:8]}…")
        checked.update(slots.tolist())
    assert checked == tree_slots(e), "the tree holds slots of a text that nobody sent"
    return len(checked)


def close(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    error = (found - wanted).abs().amax(dim=(0, 2, 3))
    worst = int(error.argmax())
    limit = TOLERANCE * float(wanted.abs().max())
    assert float(error[worst]) <= limit, (
        f"{what}: position {worst} of {len(error)} is off by {float(error[worst]):.2e} (limit {limit:.2e}); "
        f"{int((error > limit).sum())} positions are wrong"
    )


@pytest.mark.parametrize(
    ("router", "page_size"),
    sampled(
        [*product(("ar", "diffusion", "random", "none"), (1, 16))],
        ("ar", 1),
        ("diffusion", 16),
        ("random", 1),
    ),
)
def test_prompts_that_diverge_inside_a_cached_prefix(models: Models, router: str, page_size: int) -> None:
    rng = random.Random(page_size)
    stem = rng.choices(range(256), k=50)
    with engine(models.target, whiflash=models.whiflash(router), page_size=page_size) as e:
        for cut in (50, 37, 37, 16, 33, 0):
            # The last shared token is followed by another one each time: only bigram keys tell its slots apart.
            e.generate([stem[:cut] + rng.choices(range(256), k=8) for _ in range(2)], max_new_tokens=20)
        assert_tree_is_true(e, models)
        # A generated text is a prefix too, and may be left in its middle.
        said = sequences(e)[0]
        e.generate([[*said[:60], 1, 2, 3], [*said, 4, 5]], max_new_tokens=12)
        assert assert_tree_is_true(e, models) > 200


TRAFFIC: dict[str, dict[str, Any]] = {
    "aborts": {},
    "aborts-in-pages": {"page_size": 16},
    "chunks": {"chunked_prefill_size": 16},
    "chunks-in-pages": {"chunked_prefill_size": 32, "page_size": 16},
    "full-pool": {"max_total_tokens": 320},
    "small-rings": {},
}


ARRIVALS = mixed(seed=7, count=16, shared=40, aborts=0.4, stops=0.3)


@pytest.fixture(scope="module")
def answers(models: Models) -> dict[str, list[int]]:
    """Plain decoding's to `ARRIVALS`, of which none is aborted."""
    with engine(models.target) as e:
        return play(e, [replace(arrival, abort_after=None) for arrival in ARRIVALS])


@pytest.mark.parametrize("case", sampled(TRAFFIC, "aborts-in-pages", "chunks", "full-pool", "small-rings"))
def test_after_traffic(models: Models, answers: dict[str, list[int]], case: str) -> None:
    arrivals = ARRIVALS
    flags = {"whiflash_backlog_tokens": 32} if case == "small-rings" else {}
    oracle = OracleArm(0.93, seed=1)
    for arrival in arrivals:
        oracle.learn(arrival.prompt, answers[arrival.rid])
    build = engine(
        models.target,
        whiflash=models.whiflash("random", **flags),
        arms=[oracle],
        max_running_requests=6,
        **TRAFFIC[case],
    )
    with build as e:
        play(e, arrivals)
        if case == "full-pool":
            assert sum(req.retraction_count for req in e.requests.values()) > 0
        assert assert_tree_is_true(e, models) > 100
        assert not e.states
        assert not any(e.worker.sync.watermarks.known(row) for row in range(16))


RETRACTED: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"chunked_prefill_size": 8},
    "chunks-in-pages": {"chunked_prefill_size": 8, "page_size": 4},
}


@pytest.mark.parametrize(("case", "temperature"), [("whole", 0.0), ("chunks", 1.0), ("chunks-in-pages", 1.0)])
def test_retracted_requests(
    models: Models, case: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk may end inside the output that a request had; what is sampled there is thrown away."""
    from sglang.srt.managers import scheduler

    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler, "TEST_RETRACT_INTERVAL", 3 if case == "whole" else 13)
    arrivals = [
        replace(a, params={**a.params, "temperature": temperature})
        for a in mixed(seed=8, count=10, shared=30, aborts=0.3, tokens=70)
    ]
    inside = set()

    def note() -> None:
        req = e.scheduler.chunked_req
        if req is not None and req.extend_end > len(req.origin_input_ids):
            inside.add(req.rid)

    flags = models.whiflash("random")
    with engine(models.target, whiflash=flags, max_running_requests=4, **RETRACTED[case]) as e:
        play(e, arrivals, note)
        assert sum(req.retraction_count for req in e.requests.values()) > 2
        assert bool(inside) == (case != "whole")
        assert_tree_is_true(e, models)


def test_while_requests_run(models: Models) -> None:
    """What a running request has put into the tree at its prefill is as good as what it leaves at its end."""
    arrivals = mixed(seed=9, count=8, shared=40, longest=40)
    with engine(models.target, whiflash=models.whiflash("random"), chunked_prefill_size=16) as e:
        play(e, arrivals, lambda: check_running(e, models))


def check_running(e: Engine, models: Models) -> None:
    if e.scheduler.forward_ct % 20 == 0:
        assert_tree_is_true(e, models)


@pytest.mark.parametrize("router", ["ar", "diffusion"])
def test_second_turn_accepts_as_much_warm_as_cold(models: Models, router: str) -> None:
    """Turn two continues turn one's own tokens. With a hit the drafters see inherited KV, without one a new prefill."""
    rng = random.Random(5)
    turns = [(rng.choices(range(256), k=30), rng.choices(range(256), k=10)) for _ in range(2)]
    warm, cold = (list(second_turns(models, router, turns, cached)) for cached in (True, False))
    assert [w[0] for w in warm] == [c[0] for c in cold]
    assert [w[1] for w in warm] == [c[1] for c in cold]
    assert sum(accepted for _, (_, accepted) in warm) > 0, "nothing was accepted, so nothing was compared"


@pytest.mark.parametrize("page_size", [1, 16])
def test_second_turns_behind_structure_and_predictions_are_a_fresh_server_s(
    models: Models, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turn one is drafted from grammars, from tools alone and from a prediction, random arms beside; turn two reuses
    its KV.
    """
    options = {**OPTIONS, "page_size": page_size}
    first = [a for a in structured() if not a.rid.startswith("regex")]
    with engine(models.target, **options) as e:
        expected = play(e, first)
        second = {a.rid: [*a.prompt, *expected[a.rid], *b"and then"] for a in first}
        e.scheduler.flush_cache()
        fresh = dict(zip(second, e.generate(list(second.values()), max_new_tokens=30), strict=True))
    spans = {"spans": [{"kind": "tool_call", "begin": "<call>", "end": "</call>"}], "trace": True}
    tools = carried_tools([(name, json.loads(SCHEMA)) for name in ("look_up", "look_out")], "hermes")
    for a in first:
        a.params["custom_params"] = {"whiflash": json.dumps(spans), TOOLS_KEY: tools}
        if a.rid.startswith("free"):
            a.params["custom_params"][CARRIED_PREDICTION] = expected[a.rid]
    constrained, unknown = lifecycle.grammar_of, {"tag/0"}
    monkeypatch.setattr(lifecycle, "grammar_of", lambda req: None if req.rid in unknown else constrained(req))
    with engine(models.target, whiflash=models.whiflash("random"), **options) as e:
        assert play(e, first) == expected
        right = {
            name
            for a in first
            for name, brought in recording_of(e.requests[a.rid], None).sources.items()  # type: ignore[union-attr]
            if brought.accepted
        }
        assert {"grammar", "tools", "prediction"} <= right
        assert_tree_is_true(e, models)
        for rid, prompt in second.items():
            e.submit(f"second-{rid}", prompt, max_new_tokens=30)
        e.run()
        for rid in second:
            assert e.output(f"second-{rid}") == fresh[rid]
            assert e.requests[f"second-{rid}"].cached_tokens >= len(second[rid]) - 8 - page_size - 2
        assert_tree_is_true(e, models)


def second_turns(
    models: Models, router: str, turns: Sequence[tuple[list[int], list[int]]], cached: bool
) -> Iterable[tuple[list[int], tuple[int, int]]]:
    """Output of turn two, its rounds and accepted drafts."""
    with engine(models.target, whiflash=models.whiflash(router)) as e:
        for i, (first, second) in enumerate(turns):
            (said,) = e.generate([first], max_new_tokens=40)
            if not cached:
                assert e.scheduler.flush_cache()
            prompt = [*first, *said, *second]
            e.submit(f"second-{i}", prompt, max_new_tokens=60)
            e.run()
            hit = e.requests[f"second-{i}"].cached_tokens
            assert (hit >= len(first) + len(said) - 2) if cached else hit == 0
            yield e.output(f"second-{i}"), e.rounds(f"second-{i}")

"""No slot in the radix tree lacks either drafter's correct KV.

The tree hands a request's slots to later requests, and a hit brings no features to repair anything with. So after
real traffic every slot in the tree is compared with one pass over the sequence it stands for.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from engine import Engine, engine
from matrix import chosen, sampled
from model_set import Models
from request_sets import OPTIONS, SCHEMA, structured
from traffic import mixed, play
from trees import assert_tree_is_true, sequences

from whiflash_sglang.engine.scheduler.streamer import recording_of
from whiflash_sglang.serve import lifecycle
from whiflash_sglang.spans.hints import CARRIED_PREDICTION, TOOLS_KEY
from whiflash_sglang.structure.tools import carried_tools


@pytest.mark.parametrize("page_size", sampled([1, 16], 16))
def test_prompts_that_diverge_inside_a_cached_prefix(
    models: Models, page_size: int, pytestconfig: pytest.Config
) -> None:
    rng = random.Random(page_size)
    stem = rng.choices(range(256), k=50)
    with engine(models.target, whiflash=models.whiflash("none"), page_size=page_size) as e:
        for router in chosen(pytestconfig, ("ar", "diffusion", "random", "none"), "random", "none"):
            e.start_over(router)
            e.requests.clear()
            for cut in (50, 37, 37, 16, 33, 0):
                # The last shared token is followed by another one each time: only bigram keys tell its slots apart.
                e.generate([stem[:cut] + rng.choices(range(256), k=8) for _ in range(2)], max_new_tokens=20)
            assert_tree_is_true(e, models)
            # A generated text is a prefix too, and may be left in its middle.
            text = sequences(e)[0]
            e.generate([[*text[:60], 1, 2, 3], [*text, 4, 5]], max_new_tokens=12)
            assert assert_tree_is_true(e, models) > 200


@pytest.mark.parametrize("pages", [{}, {"page_size": 4}], ids=str)
def test_requests_retracted_in_the_middle_of_a_prompt(
    models: Models, pages: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk may end inside the output that a request had; what is sampled there is thrown away."""
    from sglang.srt.managers import scheduler

    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler, "TEST_RETRACT_INTERVAL", 13)
    arrivals = [
        replace(a, params={**a.params, "temperature": 1.0})
        for a in mixed(seed=8, count=10, shared=30, aborts=0.3, tokens=70)
    ]
    inside = set()

    def note() -> None:
        req = e.scheduler.chunked_req
        if req is not None and req.extend_end > len(req.origin_input_ids):
            inside.add(req.rid)

    options = {"whiflash": models.whiflash("random"), "max_running_requests": 4, "chunked_prefill_size": 8}
    with engine(models.target, **options, **pages) as e:
        play(e, arrivals, note)
        assert sum(req.retraction_count for req in e.requests.values()) > 2
        assert inside
        assert_tree_is_true(e, models)


def test_while_requests_run(models: Models) -> None:
    """KV that a running request has put into the tree at its prefill is as good as KV that it leaves at its end."""
    arrivals = mixed(seed=9, count=8, shared=40, longest=40)
    with engine(models.target, whiflash=models.whiflash("random"), chunked_prefill_size=16) as e:
        play(e, arrivals, lambda: check_running(e, models))


def check_running(e: Engine, models: Models) -> None:
    if e.scheduler.forward_ct % 20 == 0:
        assert_tree_is_true(e, models)


def test_second_turn_accepts_as_much_warm_as_cold(models: Models) -> None:
    """Turn two continues turn one's own tokens. With a hit the drafters see inherited KV, without one a new prefill."""
    rng = random.Random(5)
    turns = [(rng.choices(range(256), k=30), rng.choices(range(256), k=10)) for _ in range(2)]
    with engine(models.target, whiflash=models.whiflash("none")) as e:
        for router in ("ar", "diffusion"):
            warm, cold = (list(second_turns(e, router, turns, cached)) for cached in (True, False))
            assert warm == cold
            assert sum(accepted for _, (_, accepted) in warm) > 0, (
                "nothing was accepted, so nothing was compared"
            )


@pytest.mark.parametrize("page_size", sampled([1, 16], 16))
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
            for name, figures in recording_of(e.requests[a.rid], None).sources.items()  # type: ignore[union-attr]
            if figures["accepted"]
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
    e: Engine, router: str, turns: Sequence[tuple[list[int], list[int]]], cached: bool
) -> Iterable[tuple[list[int], tuple[int, int]]]:
    """Output of turn two, its rounds and accepted drafts."""
    e.start_over(router)
    for i, (first, second) in enumerate(turns):
        (answer,) = e.generate([first], max_new_tokens=40)
        if not cached:
            assert e.scheduler.flush_cache()
        name = f"second-{router}-{i}-{cached}"
        e.submit(name, [*first, *answer, *second], max_new_tokens=60)
        e.run()
        hit = e.requests[name].cached_tokens
        assert (hit >= len(first) + len(answer) - 2) if cached else hit == 0
        yield e.output(name), e.rounds(name)

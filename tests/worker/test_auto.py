"""`auto` in the real scheduler: what its worker keeps, and what a pinned request does to its neighbour."""

import json
import random
from collections.abc import Iterator

import pytest
from engine import Engine, engine
from held import tensors_of
from model_set import Models

PROMPTS = [random.Random(seed).choices(range(256), k=30) for seed in range(2)]


@pytest.fixture(scope="module")
def running(models: Models) -> Iterator[Engine]:
    # Spans are found in the tokens' bytes.
    options = {"max_running_requests": 2, "skip_tokenizer_init": False}
    with engine(models.target, whiflash=models.whiflash("auto"), **options) as e:
        yield e


def test_nothing_that_the_worker_keeps_is_on_a_graph(running: Engine) -> None:
    """A server starts outside `inference_mode`, in which its rounds run: what is written then stays on a graph."""
    found = tensors_of(running.worker, owners=("whiflash_sglang", "whiflash_kernels", "torch"))
    assert any(".kv.k" in path for path in found)
    assert any("rings" in path for path in found)
    assert any(".model." in path and path.endswith("weight']") for path in found)
    assert any(tensor is running.worker.tokens.data for tensor in found.values())
    assert [p for p, t in found.items() if t.requires_grad or t.grad_fn is not None] == []
    assert [p for p, t in found.items() if t.is_inference()] == [], "such a tensor could not be written at a start"
    assert "delta" not in running.worker.controller.policy.needs, "no router says it"
    assert running.worker.spool is None, "nobody asked for samples"


def arms_of(running: Engine, rid: str) -> set[str | None]:
    return {state.previous for state in running.states.values() if state.rid == rid}


@pytest.mark.parametrize("arm", ["ar", "diffusion"])
def test_a_pin_leaves_every_probe_to_its_neighbour(running: Engine, arm: str) -> None:
    """By the time that the neighbour comes, the pinned request has had both drafters to itself for long."""
    running.worker.reconfigure({"router": "auto"})  # what was learned of either drafter is forgotten
    policy = running.worker.controller.policy
    before = {name: policy.estimator.rounds(name) for name in ("ar", "diffusion")}
    hint = {"spans": [{"kind": "json", "open": True, "prefer": arm, "pin": True}], "lookup": "off"}
    names = [f"{rid}-{arm}" for rid in ("pinned", "neighbour")]
    params = [{"custom_params": {"whiflash": json.dumps(hint)}}, {"custom_params": {"whiflash": '{"lookup":"off"}'}}]
    running.submit(names[0], PROMPTS[0], max_new_tokens=200, **params[0])
    while len(running.requests[names[0]].output_ids) < 60:
        running.step()
        assert arms_of(running, names[0]) <= {arm, None}
    assert {name: policy.estimator.rounds(name) for name in before} == before, "a pin taught the shared means"
    tried: set[str | None] = set()
    running.submit(names[1], PROMPTS[1], max_new_tokens=120, **params[1])
    running.run(lambda: tried.update(arms_of(running, names[1])))
    assert tried >= {"ar", "diffusion"}

"""Two hundred requests with random aborts leave nothing behind: no slot, no state, no object, no tensor.

Objects are counted, because the size of a process says little: allocators keep what was freed, and modules that are
imported late take more than a thousand requests would.
"""

import gc
import json
import random
from collections import Counter, deque
from typing import Any

import pytest
import torch
from engine import Engine, engine
from held import held
from model_set import Models
from overlap import overlapped
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
from traffic import Arrival, play

from whiflash_sglang.spans.hints import TOOLS_KEY
from whiflash_sglang.structure.tools import carried_tools

HALF = 60
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["one", "two"]}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
CALLS = {"spans": [{"kind": "tool_call", "begin": "<", "end": ">"}], "agent": "planner"}
SAID: list[dict[str, Any]] = [
    {},
    {"json_schema": json.dumps(SCHEMA), "ignore_eos": False},
    {"custom_params": {"whiflash": json.dumps(CALLS), TOOLS_KEY: carried_tools([("find", SCHEMA)], "hermes")}},
    {"custom_params": {"whiflash": json.dumps({"spans": [{"kind": "json", "open": True}]})}},
    {"custom_params": {"whiflash_prediction": list(range(40))}},
]
"""Contents of requests: nothing, a grammar, tools, an open span, a prediction."""

OWNERS = ("whiflash_sglang", "whiflash_cpu", "whiflash_kernels", "sglang")


def requests(half: int) -> list[Arrival]:
    rng = random.Random(half)
    stem = rng.choices(range(256), k=48)
    return [
        Arrival(
            f"h{half}-{i:04d}",
            rng.randint(0, 2 * HALF),
            tuple(stem[: rng.randint(0, 48)] + rng.choices(range(256), k=rng.randint(1, 30))),
            {
                "max_new_tokens": rng.randint(1, 40),
                "temperature": rng.choice([0.0, 0.8]),
                "frequency_penalty": rng.choice([0.0, 0.3]),
                "cache_salt": rng.choice(["mine", "theirs", None]),
                **rng.choice(SAID),
            },
            rng.randint(0, 12) if rng.random() < 0.4 else None,
        )
        for i in range(HALF)
    ]


def objects() -> Counter[str]:
    """Living objects of our classes and the engine's, by class."""
    gc.collect()
    kinds = Counter(type(o) for o in gc.get_objects())
    return Counter(
        {f"{k.__module__}.{k.__qualname__}": n for k, n in kinds.items() if str(k.__module__).split(".")[0] in OWNERS}
    )


def entries(root: Any) -> int:
    """Entries of all containers, and elements of all tensors, that our own objects lead to from `root`."""
    every = [kept for _, kept in held(root)]
    elements = sum(kept.numel() for kept in every if isinstance(kept, torch.Tensor))
    containers = dict | list | tuple | set | frozenset | deque
    return elements + sum(len(kept) for kept in every if isinstance(kept, containers))


@pytest.mark.parametrize("start", [engine, overlapped])
def test_new_weights_right_behind_an_answer_empty_the_tree(
    models: Models, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The scheduler has made no pass since; under overlap a round of the request that ended is under way."""
    prompt = list(range(3, 43))
    with start(models.target, whiflash=models.whiflash("random")) as e:
        [text] = e.generate([prompt], max_new_tokens=20)
        stop = next(i for i in range(5, 20) if text[i] not in text[:i])
        for number in range(3):
            e.submit(f"{number}", prompt, max_new_tokens=20, ignore_eos=False, stop_token_ids=[text[stop]])
        e.step()
        assert not e.scheduler.is_fully_idle(), "they have a first token, and are in the last batch only"
        while not all(e.requests[f"{number}"].finished() for number in range(3)):
            e.step()
        assert bool(e.scheduler.result_queue) is (start is overlapped)
        request = UpdateWeightFromDiskReqInput(model_path=str(models.target), load_format="auto")
        written = e.scheduler.weight_updater.update_weights_from_disk(request)
        assert written.success, written.message
        e.check_leaks()
        assert e.generate([prompt], max_new_tokens=20) == [text]
        e.worker.stages.lifecycle._drop = e.worker.sync.watermarks.forget = lambda *_: None  # nothing goes
        e.generate([prompt], max_new_tokens=2)
        caplog.clear()
        for _ in range(2):
            e.scheduler.on_idle()
        said = [record.getMessage() for record in caplog.records if "nothing runs" in record.getMessage()]
        assert len(said) == 2, "once for each that keeps something"
        assert "requests are kept in rows [" in said[0]
        assert "backlogs are kept in rows [" in said[1]
        assert not any(req.cached_tokens for rid, req in e.requests.items() if rid.startswith("g000004"))


def test_many_requests_with_aborts(models: Models) -> None:
    with engine(
        models.target,
        whiflash=models.whiflash("random"),
        skip_tokenizer_init=False,
        max_running_requests=6,
        max_total_tokens=1024,
        chunked_prefill_size=32,
    ) as e:
        found = [after(half, e) for half in range(2)]
        free = e.scheduler.token_to_kv_pool_allocator.available_size()
        assert free == e.scheduler.max_total_num_tokens
    (before, kept_before), (behind, kept_behind) = found
    grown = {name: n - before[name] for name, n in behind.items() if n > before[name]}
    print(f"from request {HALF} to {2 * HALF}: {grown}, {kept_behind - kept_before} entries")
    assert sum(grown.values()) < HALF // 2
    assert kept_behind - kept_before < HALF // 2


def after(half: int, e: Engine) -> tuple[Counter[str], int]:
    """Objects that live when a hundred requests have ended and are forgotten, and the tree is empty."""
    outputs = play(e, requests(half))  # ends with SGLang's own leak check
    assert len(outputs) == HALF
    assert e.states == {}
    e.worker.forget(None)  # what tenants left, and taught: bounded, and kept on purpose
    assert not e.worker.sync.watermarks.rows
    e.requests.clear()
    e.worker.tally.round_seconds.clear()  # bounded, and taken whenever metrics are published
    e.worker.tally.acceptance.clear()
    assert e.scheduler.flush_cache()
    return objects(), entries(e.worker)

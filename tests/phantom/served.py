"""A process in which stock SGLang serves on a phantom H100 with WHIFLASH; what it found goes to a file as JSON.

python served.py FILE ATTENTION[,ATTENTION] TARGET [EAGLE3 DFLASH [ADAPTER ADAPTER]]

One backend of attention after the other; the first is asked more, unless there are adapters, which are of the target.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), *(str(TESTS / part) for part in ("phantom", "worker", "graphs"))]

from upstream import ENVIRONMENT, driver, sglang_on_card  # noqa: E402

os.environ |= ENVIRONMENT

from card import phantom  # noqa: E402
from streams import Streams  # noqa: E402

SEEN = ("stalls", "pageable", "waits_of_host", "races")
"""Counters of the world that are noted."""

OPTIONS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "float32",
    "sampling_backend": "pytorch",
    "enable_custom_logit_processor": True,
    "max_running_requests": 8,  # each size of a graph is captured
    "chunked_prefill_size": 64,
    "context_length": 200,  # some kernels are interpreted over all of it
    "skip_tokenizer_init": False,
}

TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<tool_call>",
        "content": {"type": "json_schema", "json_schema": {"const": {"name": "f", "arguments": {}}}},
        "end": "</tool_call>",
    },
}
"""A strict call of a tool."""
NOT_GREEDY: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
    "penalised": {"frequency_penalty": 0.5},
    "biased": {"logit_bias": {"70": 2.0}},
}
"""Requests whose tokens are drawn, or are the likeliest of changed logits."""
CONSTRAINED: dict[str, dict[str, Any]] = {
    "regex": {"regex": "(red|green)( blue)*"},
    "schema": {
        "json_schema": json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})
    },
    "tool": {"structural_tag": json.dumps(TAG)},
}
"""Requests under grammars, of any whitespace."""
RATED: dict[str, dict[str, Any]] = {
    "rated three": {"return_logprob": True, "top_logprobs_num": 3},
    "rated none": {"return_logprob": True, "top_logprobs_num": 0},
}
"""Requests that ask for log-probabilities."""
GRAMMAR = {"regex": "[a-z ]{200}"}
RATED_TOO = RATED["rated three"] | {"token_ids_logprob": [70]}
ONE: dict[str, dict[str, Any]] = {
    "grammar": GRAMMAR,
    "all": {**GRAMMAR, **NOT_GREEDY["biased"], **NOT_GREEDY["penalised"], **RATED_TOO},
}
"""Parameters of one of four requests in a pass whose launches are counted."""


def main() -> None:
    """The command line."""
    file, attentions, target, *given = sys.argv[1:]
    names, adapters = ("whiflash_eagle_draft", "draft"), list(map(Path, given[2:]))
    whole = len(given) == len(names)
    whiflash = {"whiflash_router": "random", **dict(zip(names, given, strict=False))}
    with tempfile.TemporaryDirectory() as name, phantom() as world:
        driver(Path(name))
        os.environ["WHIFLASH_CACHE"] = name  # so that every run measures prices
        found = {}
        for attention in attentions.split(","):
            found[attention] = served(world, Path(target), whiflash, attention, adapters, whole)
            whole = False
        Path(file).write_text(json.dumps(found))


def with_adapters(adapters: Sequence[Path]) -> dict[str, Any]:
    """Arguments of an engine with these."""
    from sglang.srt.lora.lora_registry import LoRARef

    refs = [LoRARef(lora_id=path.name, lora_name=path.name, lora_path=str(path), pinned=False) for path in adapters]
    lora = {"enable_lora": True, "lora_paths": refs, "lora_backend": "triton", "max_lora_rank": 8}
    return {**lora, "max_loras_per_batch": 3, "max_running_requests": 4}


def served(
    world: Streams, target: Path, whiflash: dict[str, Any], attention: str, adapters: Sequence[Path], whole: bool
) -> dict[str, Any]:
    """Requests of different lengths and times, some aborted, some retracted, under SGLang's overlap loop.

    whole: whether more is asked (`in_detail`); else there are half as many requests, too.
    """
    import torch
    from engine import engine
    from overlap_loop import OverlapLoop
    from places import places_for_cards, reached
    from sglang.srt.managers import scheduler
    from traffic import Arrival, mixed, play

    from whiflash_sglang.engine.scheduler import pricing

    arrivals = [
        *mixed(seed=31, count=16 if whole else 8, shared=40, aborts=0.3, stops=0.3, tokens=24),
        *(
            Arrival(name, 3, tuple(range(40, 70)), {"max_new_tokens": 12, **params})
            for name, params in (NOT_GREEDY | RATED).items()
        ),
    ]
    options = OPTIONS if whole else OPTIONS | {"max_running_requests": 3}  # most of a start is captures by size
    if adapters:
        options, names = OPTIONS | with_adapters(adapters), cycle([*(path.name for path in adapters), None])
        arrivals = [replace(a, params={**a.params, "lora_id": next(names)}) for a in arrivals]
    with sglang_on_card(world) as launches, ExitStack() as running:
        wanted = places_for_cards() if whole else set()
        with reached(wanted) as places, patch.object(pricing, "measure", timed):
            started = running.enter_context(engine(target, whiflash=whiflash, attention_backend=attention, **options))
        torch.cuda.synchronize()
        for seen in (*(getattr(world, name) for name in SEEN), launches.counts):
            seen.clear()
        scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = True, 5
        loop = OverlapLoop(started.scheduler)
        loop.submit("first", list(range(20)), max_new_tokens=8)  # as SGLang begins, with a request of its own
        loop.run()
        known, captured = set(launches.compiled), torch.cuda.CUDAGraph.replays
        ingest, together = loop.scheduler.ingest_requests, 0

        def ingesting() -> list[Any]:
            nonlocal together
            together = max(together, len(loop.scheduler.running_batch.reqs))
            return ingest()

        loop.scheduler.ingest_requests = ingesting
        texts = play(loop, arrivals)
        noted = {name: dict(getattr(world, name)) for name in SEEN}
        counts, replays = dict(launches.counts), torch.cuda.CUDAGraph.replays - captured
        rounds = {arm: each.rounds for arm, each in loop.worker.tally.by_arm.items()}
        loop.scheduler.ingest_requests = ingest
        scheduler.TEST_RETRACT = False
        compiled = sorted(launches.compiled - known)
        more = in_detail(world, loop, launches, wanted - places) if whole else {}
        return {
            "compiled": compiled,
            "texts": {rid: text for rid, text in texts.items() if rid != "sampled"},
            "changed": {rid: NOT_GREEDY[rid] for rid in ("penalised", "biased")},
            "prompts": {arrival.rid: arrival.prompt for arrival in arrivals},
            "adapters": {arrival.rid: arrival.params.get("lora_id") for arrival in arrivals},
            "retracted": sum(req.retraction_count for req in loop.requests.values()),
            "attention": started.scheduler.server_args.attention_backend,
            "together": together,
            "replays": replays,
            "rounds": rounds,
            "launches": counts,
            **more,
            "dangling": torch.cuda.CUDAGraph.dangling(),  # type: ignore[attr-defined]
            **noted,
        }


def in_detail(world: Streams, loop: Any, launches: Any, places: set[Any]) -> dict[str, Any]:
    """Places that are not reached yet, nor then; requests under grammars; a pass's launches; planted faults."""
    from places import reached
    from traffic import mixed, play

    with reached(places) as late:
        play(loop, mixed(seed=32, count=2, tokens=8))
    return {
        "missed": dict(Counter(path for path, _ in places - late)),
        "constrained": under_grammars(world, loop),
        "passes": {
            "greedy": steady(loop, launches),
            "sampled": steady(loop, launches, temperature=0.6, top_p=0.95),
            **{name: steady(loop, launches, one) for name, one in (ONE | {"thinking": budget(0)}).items()},
            **{
                name: steady(loop, launches, one, ("ar", "diffusion", "none", "none") * 2)
                for name, one in (("eight", {}), ("budget", budget(1000)))
            },
        },
        "planted": {name: planted(world, loop, name, fault) for name, fault in FAULTS.items()},
    }


def timed(body: Callable[[], object], clock: Any, **_: Any) -> float:
    """In place of `measure`, which takes the median of several: no price means anything here."""
    begin = clock.record()
    body()
    end = clock.record()
    clock.wait(end)
    return float(clock.elapsed(begin, end))


@contextmanager
def overlapping(loop: Any) -> Iterator[Counter[bool]]:
    """How many passes of the scheduler are not overlapped, and how many are."""
    asked, is_disabled = Counter[bool](), loop.scheduler.is_disable_overlap_for_batch

    def noted(batch: Any, last_batch: Any) -> bool:
        disabled = bool(is_disabled(batch, last_batch))
        asked[disabled] += 1
        return disabled

    with patch.object(loop.scheduler, "is_disable_overlap_for_batch", noted):
        yield asked


def under_grammars(world: Streams, loop: Any) -> dict[str, Any]:
    """Requests under grammars beside others: their texts, the passes that were not overlapped, and what they read."""
    from traffic import Arrival, mixed, play

    arrivals = [Arrival(name, 0, tuple(name.encode()), params) for name, params in CONSTRAINED.items()]
    for seen in (world.stalls, world.races):
        seen.clear()
    alone = {**CONSTRAINED["regex"], "max_new_tokens": 0}  # as SGLang warms up `n` answers
    with overlapping(loop) as asked:
        texts = play(loop, [*mixed(seed=33, count=2, tokens=8), *arrivals, Arrival("alone", 5, (97, 98), alone)])
    return {
        "alone": loop.requests["alone"].finished_reason.to_json()["type"],
        "grammars": CONSTRAINED,
        "texts": {name: texts[name] for name in CONSTRAINED},
        "overlapped": asked[False],
        "not overlapped": asked[True],
        "stalls": dict(world.stalls),
        "races": dict(world.races),
    }


def budget(most: int) -> dict[str, Any]:
    """Parameters of a request that may think for so long, and does not. Its processor is a class that travels by value.

    With 0 every row has a mask, since thinking may begin at each.
    """
    from sglang.srt.sampling.custom_logit_processor import ThinkingBudgetLogitProcessor

    ids = dict(zip(ThinkingBudgetLogitProcessor.__annotations__, (5, 6, 10), strict=True))
    kind: Any = type("Budget", (ThinkingBudgetLogitProcessor,), {"__module__": "__main__", **ids})
    return {"custom_logit_processor": kind.to_str(), "custom_params": {"thinking_budget": most}}


def steady(
    loop: Any,
    launches: Any,
    one: dict[str, Any] | None = None,
    routes: Sequence[str] = ("ar", "diffusion", "none", "none"),
    graphs: bool = False,
    **params: float,
) -> dict[str, int]:
    """Launches of a pass of the scheduler in which nobody comes or goes: four requests, each with another arm.
    All passes overlap.

    one: parameters of the first. routes: of as many requests. graphs: whether to count what their graphs launch, too.
    """
    passes, inside = list[Counter[str]](), Counter[str]()
    controller = getattr(loop.worker, "controller", Counter)  # SGLang's decoding routes nothing
    plan = getattr(controller, "route", None)

    def route(rows: Any, forecasts: Any) -> list[str]:
        plan(rows, forecasts)
        return [arm if arm in may else "none" for arm, may in zip(routes, forecasts, strict=False)]

    with patch.object(controller, "route", route, create=plan is None), overlapping(loop) as asked:
        rids = [f"steady {i} {params} {one} {len(routes)}" for i in range(len(routes))]
        for i, rid in enumerate(rids):
            prompt = [1 + i, 2, 3, 1 + i, 2, 3, 1 + i, 2]
            loop.submit(rid, prompt, max_new_tokens=60, **params, **((one or {}) if i == 0 else {}))
        for _ in range(7):
            inside.clear()
            with launches.whole(inside) as seen:
                loop.step()
            if len(getattr(loop.scheduler.last_batch, "reqs", ())) == len(routes):
                within = Counter({f"in a graph: {name}": n for name, n in inside.items() if graphs})
                passes.append(+seen + within)
        for rid in rids:
            loop.abort(rid)
        loop.run()
    assert not asked[True]
    return min(passes[2:], key=Counter.total)


def reads(rows: Any) -> None:
    rows.indptr.tolist()


def uploads(rows: Any) -> None:
    import torch

    torch.tensor([1], device=rows.indptr.device)


def races(rows: Any) -> None:
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        rows.indptr.add_(0)


FAULTS: dict[str, Callable[[Any], None]] = {"stalls": reads, "pageable": uploads, "races": races}
"""Faults that show if a round has them after its verification."""


def planted(world: Streams, loop: Any, name: str, fault: Callable[[Any], None]) -> int:
    """How often the fault is seen in a few rounds."""
    from whiflash_sglang.round.epilogue import Epilogue

    commit, seen = Epilogue.commit, getattr(world, name)

    def spoilt(self: Any, verified: Any, *rest: Any) -> Any:
        fault(verified)
        return commit(self, verified, *rest)

    seen.clear()
    with patch.object(Epilogue, "commit", spoilt):
        loop.submit(name, list(range(20)), max_new_tokens=4)
        loop.run()
    return sum(seen.values())


if __name__ == "__main__":
    main()

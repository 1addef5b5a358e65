"""Launches of a pass of an algorithm on a phantom H100, its passes that lose overlap, and the host's waits for the
card: `WHIFLASH` beside SGLang's own `EAGLE3` and `DFLASH`.

python beside.py FILE ALGORITHM TARGET EAGLE3 DFLASH
"""

import contextlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import served
from launches import Launches
from streams import Streams
from upstream import driver, sglang_on_card

REQUESTS = 6
"""Requests of a run, every third of its kind."""
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"temperature": 0.6, "top_p": 0.95},
    "JSON schema": served.CONSTRAINED["schema"],
    "structural tag": served.CONSTRAINED["tool"],
    "regex": served.CONSTRAINED["regex"],
    "EBNF": {"ebnf": 'root ::= ("red" | "green") (" blue")*'},
}
EAGLE3 = {"speculative_num_steps": 5, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 6}


def main() -> None:
    """The command line."""
    file, algorithm, *models = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name, served.phantom() as world:
        driver(Path(name))
        os.environ["WHIFLASH_CACHE"] = name
        Path(file).write_text(json.dumps(counted(world, algorithm, *map(Path, models)), indent=1))


def counted(world: Streams, algorithm: str, target: Path, eagle3: Path, dflash: Path) -> dict[str, Any]:
    """Launches of a pass by kind of request and line; passes and waits by kind."""
    from engine import engine
    from overlap_loop import OverlapLoop

    from whiflash_sglang.compat.scheduler import pricing

    arguments: dict[str, Any] = {"attention_backend": "fa3", **served.OPTIONS}
    if algorithm == "WHIFLASH":
        arguments["whiflash"] = {
            "whiflash_router": "random",
            "whiflash_eagle_draft": str(eagle3),
            "draft": str(dflash),
        }
    else:
        own = {"speculative_draft_model_path": str(dflash)}
        if algorithm == "EAGLE3":
            own = {"speculative_draft_model_path": str(eagle3), **EAGLE3}
        # Graphs of prefills are captured in pieces, which the phantom card's are not.
        arguments |= {"speculative_algorithm": algorithm, "cuda_graph_backend_prefill": "disabled", **own}
    with (
        sglang_on_card(world) as launches,
        of_upstream(launches),
        patch.object(pricing, "measure", served.timed),
        engine(target, **arguments) as started,
    ):
        loop = OverlapLoop(started.scheduler)
        loop.submit("first", list(range(20)), max_new_tokens=8)
        loop.run()
        kinds = {kind: of_kind(world, loop, kind, params) for kind, params in KINDS.items()}
        passes = {kind: served.steady(loop, launches, **KINDS[kind]) for kind in ("plain", "sampled")}
    return {"passes": passes, "kinds": kinds}


@contextlib.contextmanager
def of_upstream(launches: Launches) -> Iterator[None]:
    """Kernels that SGLang's algorithms compile with `nvcc` are taken by the CPU platform's."""
    import torch
    from sglang.srt.speculative import dflash_utils, eagle_utils

    from whiflash_sglang.platform import spec_ops

    def chain(*args: Any) -> None:
        """A chain needs no mask; the CPU platform's has another layout."""
        *given, _ = args
        given[3] = torch.empty(args[2].numel() * args[10] ** 2, dtype=torch.bool)
        spec_ops.build_tree_kernel_efficient_func(*given, tree_mask_mode=1)

    def launch(name: str, kernel: Any, *args: Any, **named: Any) -> Any:
        return launches.of(name.removesuffix("_func"), kernel, *args, **named)

    taken: dict[str, Any] = {
        "build_tree_kernel_efficient_func": chain,
        "verify_tree_greedy_func": spec_ops.verify_tree_greedy_func,
        "tree_speculative_sampling_target_only": spec_ops.tree_speculative_sampling_target_only,
        "top_k_renorm_prob": spec_ops.top_k_renorm_prob,
        "top_p_renorm_prob": spec_ops.top_p_renorm_prob,
    }
    with contextlib.ExitStack() as stack:
        for module in (eagle_utils, dflash_utils):
            for name, kernel in taken.items():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, partial(launch, name, kernel)))
        yield


def of_kind(world: Streams, loop: Any, kind: str, params: dict[str, Any]) -> dict[str, Any]:
    """Decode passes of requests of which every third is of the kind, those that were not overlapped, and the lines
    where the host read the card in them, or waited for an event.
    """
    scheduler, counts, reads, waits = loop.scheduler, Counter[str](), Counter[str](), Counter[str]()
    is_disabled = scheduler.is_disable_overlap_for_batch

    def noted(batch: Any, last_batch: Any) -> bool:
        disabled = bool(is_disabled(batch, last_batch))
        if batch and batch.forward_mode.is_decode():
            counts["passes"] += 1
            counts["not overlapped"] += disabled
        return disabled

    for number in range(REQUESTS):
        prompt = [*f"{kind} {number}".encode()]
        loop.submit(f"{kind} {number:02d}", prompt, max_new_tokens=24, **(params if number % 3 == 0 else {}))
    with patch.object(scheduler, "is_disable_overlap_for_batch", noted):
        while True:
            for seen in (world.stalls, world.waits_of_host):
                seen.clear()
            if not loop.step() and not loop.waiting:
                break
            batch = scheduler.last_batch
            if batch and batch.forward_mode.is_decode():
                reads.update({site.split()[0]: n for site, n in world.stalls.items()})
                waits.update(world.waits_of_host)
    return {**counts, "reads": dict(reads), "waits": dict(waits)}


if __name__ == "__main__":
    main()

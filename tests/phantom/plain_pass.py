"""Launches of a round without drafts beside those of SGLang's decoding, on a phantom H100, with those of its graphs.

python plain.py ATTENTION

A line is a launch that one has and another has not: how often SGLang's decoding launches it, and our round under the
policies `none` and `auto`, for each number of requests. Three of the tiny target's four layers are captured.
"""

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import served

RUNS, REQUESTS = ("SGLang", "none", "auto"), (1, 8)


def main() -> None:
    """The command line."""
    from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

    found = {}
    with tempfile.TemporaryDirectory() as name, served.phantom() as world:
        served.driver(Path(name))
        os.environ["WHIFLASH_CACHE"] = name
        target = tiny_target(Path(name) / "target", peaked=True, num_layers=4)
        pair = tiny_eagle3(Path(name) / "eagle3", target), tiny_dflash(Path(name) / "dflash", target)
        for run in RUNS:
            ours = {"whiflash_eagle_draft": str(pair[0]), "draft": str(pair[1]), "whiflash_router": run}
            ours |= {"whiflash_lookup": "off", "whiflash_structure": "off"}  # the tiny target's texts are copies
            counts = counted(world, target, {"whiflash": ours} if run != "SGLang" else {})
            found |= {f"{run}, {requests}": each for requests, each in counts.items()}
    print(f"| launches | {' | '.join(found)} |\n|---{'|---' * len(found)}|")
    for launch in sorted(set().union(*found.values())):
        numbers = [each[launch] for each in found.values()]
        if len(set(numbers)) > 1:
            print(f"| {launch} | {' | '.join(map(str, numbers))} |")
    print(f"| all | {' | '.join(str(each.total()) for each in found.values())} |")


def counted(world: Any, target: Path, ours: dict[str, Any]) -> dict[int, Counter[str]]:
    """Launches of a pass by requests."""
    from engine import engine
    from overlap_loop import OverlapLoop

    from whiflash_sglang.engine.scheduler import pricing

    # Graphs of prefills are captured in pieces, which the phantom card's are not.
    options = {"max_running_requests": max(REQUESTS), "cuda_graph_backend_prefill": "disabled", **ours}
    with (
        served.sglang_on_card(world) as launches,
        patch.object(pricing, "measure", served.timed),
        engine(target, **served.OPTIONS | options, attention_backend=sys.argv[1]) as started,
    ):
        loop = OverlapLoop(started.scheduler)
        loop.submit("first", list(range(20)), max_new_tokens=8)
        loop.run()
        return {n: Counter(served.steady(loop, launches, routes=("none",) * n, graphs=True)) for n in REQUESTS}


if __name__ == "__main__":
    main()

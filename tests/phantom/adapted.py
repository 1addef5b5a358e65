"""A process in which stock SGLang serves adapters (LoRA) on a phantom H100; what it found goes to a file as JSON.

python adapted.py FILE TARGET EAGLE3 DFLASH ADAPTER ADAPTER
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), *(str(TESTS / part) for part in ("phantom", "worker"))]

from upstream import ENVIRONMENT, driver, sglang_on_card  # noqa: E402

os.environ |= ENVIRONMENT

from card import phantom  # noqa: E402
from streams import Streams  # noqa: E402


def main() -> None:
    """The command line."""
    file, *models = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as name, phantom() as world:
        driver(Path(name))
        os.environ["WHIFLASH_CACHE"] = name  # so that every run measures prices
        file.write_text(json.dumps(adapted(world, *models)))


def adapted(world: Streams, target: Path, eagle3: Path, dflash: Path, *adapters: Path) -> dict[str, Any]:
    """Requests of both adapters and of the target itself, some aborted, some retracted, under SGLang's overlap loop."""
    import torch
    from engine import engine
    from overlap_loop import OverlapLoop
    from served import OPTIONS, SEEN, timed
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.managers import scheduler
    from traffic import mixed, play

    from whiflash_sglang.engine.scheduler import pricing

    refs = [
        LoRARef(lora_id=path.name, lora_name=path.name, lora_path=str(path), pinned=False)
        for path in adapters
    ]
    options = OPTIONS | {
        "enable_lora": True,
        "lora_paths": refs,
        "lora_backend": "triton",
        "max_lora_rank": 8,
    }
    options |= {"max_loras_per_batch": 3, "max_running_requests": 4}
    whiflash = {"draft": dflash, "whiflash_eagle_draft": str(eagle3), "whiflash_router": "random"}
    names = cycle([*(path.name for path in adapters), None])
    arrivals = [
        replace(a, params={**a.params, "lora_id": next(names)})
        for a in mixed(seed=31, count=9, shared=40, aborts=0.2, stops=0.3, tokens=16)
    ]
    with (
        sglang_on_card(world) as launches,
        patch.object(pricing, "measure", timed),
        engine(target, whiflash=whiflash, attention_backend="fa3", **options) as started,
    ):
        torch.cuda.synchronize()
        for seen in (*(getattr(world, name) for name in SEEN), launches.counts):
            seen.clear()
        scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = True, 5
        loop, captured = OverlapLoop(started.scheduler), torch.cuda.CUDAGraph.replays
        texts = play(loop, arrivals)
        return {
            "texts": texts,
            "prompts": {a.rid: a.prompt for a in arrivals},
            "adapters": {a.rid: a.params["lora_id"] for a in arrivals},
            "retracted": sum(req.retraction_count for req in loop.requests.values()),
            "replays": torch.cuda.CUDAGraph.replays - captured,
            "rounds": started.worker.clock.rounds,
            "launches": dict(launches.counts),
            "dangling": torch.cuda.CUDAGraph.dangling(),  # type: ignore[attr-defined]
            **{name: dict(getattr(world, name)) for name in SEEN},
        }


if __name__ == "__main__":
    main()

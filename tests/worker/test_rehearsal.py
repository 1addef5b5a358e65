"""What the pool leaves free for the largest sampled verification, and that it is rehearsed."""

import json
from pathlib import Path
from typing import Any

import torch
from engine import engine
from model_set import Models

from whiflash_sglang.compat import rehearsal


def peak_bytes(body: Any, trace: Path) -> int:
    """Most bytes that `body` held at once, by torch's own count of a CPU's allocations."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        body()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def test_the_pool_leaves_room_for_sampling_at_its_peak(models: Models, tmp_path: Path) -> None:
    with engine(models.target, whiflash=models.whiflash("none")) as e:
        runner, rows = e.worker.target.runner, 136
        vocabulary = runner.model_config.vocab_size

        def sampled() -> None:
            rehearsal.rehearse_sampling(runner, rows)

        sampled()
        peak = peak_bytes(sampled, tmp_path / "trace.json")
        print(f"{peak / (rows * vocabulary):.1f} bytes a logit")
        assert 0.8 * rehearsal.LOGIT_BYTES < peak / (rows * vocabulary) <= rehearsal.LOGIT_BYTES

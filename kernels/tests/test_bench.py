"""The measuring script runs from end to end; a GPU's results need a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"

TINY = """
import dataclasses, sys
sys.path.insert(0, sys.argv.pop(1))
import bench
small = dict(hidden=32, heads=2, kv_heads=1, dim=16, intermediate=48, vocab=300, router_units=8)
bench.SHAPES["tiny"] = dataclasses.replace(bench.SHAPES["smollm2-135m"], name="Tiny", **small)
sys.exit(bench.main())
"""

OPS = (
    "accept_and_commit choose_drafts claim_backlogs cut_drafts dflash_catch_up draft_attention draft_inputs fill_slots "
    "eagle3_catch_up lay_drafts park pass_rows penalise_rows prepare_mixed_block propose_copies rms_norm router_mlp "
    "routing_stats sample_rows silu_and_mul unpark verify_attention"
)


def test_every_op_is_measured_and_the_results_are_kept(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--shape", "tiny", "--no-compile", "--budget-ms", "5", "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TINY, str(BENCH), *options, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    (kept,) = tmp_path.glob("tiny-*.json")
    document = json.loads(kept.read_text())
    assert {row["op"] for row in document["rows"]} == set(OPS.split())
    for row in document["rows"]:
        assert 0 < row["timing"]["p10_us"] <= row["timing"]["median_us"] <= row["timing"]["p90_us"]
    assert {"revision", "torch", "triton", "gpu", "cpu", "command"} <= document["provenance"].keys()
    assert kept.with_suffix(".md").read_text() in result.stdout


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "bench.py"), "--output", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no GPU here, so nothing was measured" in result.stderr
    assert not list(tmp_path.iterdir())

"""Every kernel compiles for three GPU architectures without a GPU, and none spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
MOST_COMPILED = 10
"""Of what timed passes and first copies launch, for batches of up to 256 requests. A ratchet: lower it only."""

TARGETS = {"sm_80", "sm_90", "sm_100"}


def test_batches_of_any_size_share_their_kernels() -> None:
    """A kernel is compiled for what may be 64, 128 or 256 requests, at the start where nothing else launches it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "aot.py"), "--batches", "200"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    compiled = json.loads(result.stdout)
    print(compiled)
    warmed = ("_lay_kernel", "_merge_drafts_kernel", "_compete_kernel", "_prepare_kernel", "_accept_kernel")
    assert {compiled.pop(name) for name in warmed} == {0}
    assert len(compiled) >= 6
    assert sum(compiled.values()) <= MOST_COMPILED


@pytest.mark.aot
def test_every_kernel_compiles_and_nothing_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(BENCH / "aot.py"), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)["kernels"]
    compiled = {(entry["kernel"], entry["case"], entry["target"]) for entry in report}
    assert {target for _, _, target in compiled} == TARGETS
    assert all((kernel, case, target) in compiled for kernel, case, _ in compiled for target in TARGETS)
    assert all(entry["stack_bytes"] == 0 and entry["local_bytes"] == 0 for entry in report)
    assert all(0 < entry["registers"] <= 255 for entry in report)

    kept = json.loads((BENCH / "results" / "aot.json").read_text())["kernels"]
    names = {(entry["kernel"], entry["case"], entry["target"]) for entry in kept}
    assert names == compiled, "the kept report is of other kernels: run kernels/bench/aot.py --write"

"""Every kernel compiles for six GPU architectures without a GPU, and none spills."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
TARGETS = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}


def test_no_batch_compiles_a_kernel() -> None:
    """Nothing is compiled for random batches of up to 256 requests that was not compiled at the start."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "aot.py"), "--batches", "200"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    compiled = json.loads(result.stdout)
    print(compiled)
    assert len(compiled) == 15
    assert set(compiled.values()) == {0}


def assert_two_blocks_fit(report: list[dict[str, Any]]) -> None:
    """Two blocks of a drafter's attention fit on one multiprocessor of an H100."""
    found = [
        entry
        for entry in report
        if entry["kernel"] == "_attend_kernel"
        and entry["target"] == "sm_90"
        and entry["case"].startswith("draft_attention")
        and "x 16 rows" in entry["case"]
        and "Qwen3-8B" in entry["case"]
    ]
    assert len(found) == 4
    assert max(2 * 32 * entry["warps"] * entry["registers"] for entry in found) <= 65_536
    assert max(2 * (entry["shared_bytes"] + 1024) for entry in found) <= 228 * 1024


def test_the_kept_report_fits_every_card() -> None:
    """As the next test asks of what it compiles: heads of 256 under the 99 KB of sm_86, sm_89 and sm_120, too."""
    kept = json.loads((BENCH / "results" / "aot.json").read_text())["kernels"]
    assert {entry["target"] for entry in kept} == TARGETS
    wide = [entry for entry in kept if "heads of 256" in entry["case"] and entry["target"] == "sm_120"]
    assert 80_000 < max(entry["shared_bytes"] for entry in wide) <= 99 * 1024
    assert_two_blocks_fit(kept)


PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import aot
aot.CAPABILITIES = tuple(int(target[3:]) for target in sys.argv.pop(1).split(","))
sys.exit(aot.main())
"""


@pytest.mark.aot
@pytest.mark.parametrize(
    "targets", [{"sm_90"}, pytest.param(TARGETS, marks=pytest.mark.evidence)], ids=["an H100", "all"]
)
def test_every_kernel_compiles_and_nothing_spills(targets: set[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(BENCH), ",".join(sorted(targets)), "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)["kernels"]
    compiled = {(entry["kernel"], entry["case"], entry["target"]) for entry in report}
    assert {target for _, _, target in compiled} == targets
    assert all((kernel, case, target) in compiled for kernel, case, _ in compiled for target in targets)
    assert all(entry["local_bytes"] == 0 for entry in report)  # the command checks the stack
    assert all(0 < entry["registers"] <= 255 for entry in report)
    assert_two_blocks_fit(report)

    kept = json.loads((BENCH / "results" / "aot.json").read_text())["kernels"]
    names = {(entry["kernel"], entry["case"], entry["target"]) for entry in kept}
    assert {name for name in names if name[2] in targets} == compiled, (
        "the kept report is of other kernels: run kernels/bench/aot.py --write"
    )

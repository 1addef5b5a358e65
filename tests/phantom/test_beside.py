"""WHIFLASH's passes beside those of SGLang's EAGLE3 and DFLASH on the same phantom card: what they launch and lose."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

if find_spec("sgl_kernel") is None or shutil.which("cc") is None:
    pytest.skip("without SGLang's operators for CUDA, or a C compiler", allow_module_level=True)


@pytest.mark.evidence
def test_no_algorithm_launches_less_or_overlaps_more(tmp_path: Path) -> None:
    target = tiny_target(tmp_path / "target", peaked=True)
    models = target, tiny_eagle3(tmp_path / "eagle3", target), tiny_dflash(tmp_path / "dflash", target)
    algorithms = "WHIFLASH", "EAGLE3", "DFLASH"
    counts = {each: counted(tmp_path / f"{each}.json", each, *models) for each in algorithms}
    totals = {
        each: {kind: sum(passes.values()) for kind, passes in one["passes"].items()}
        for each, one in counts.items()
    }
    for kind in ("plain", "sampled"):
        assert totals["WHIFLASH"][kind] == min(total[kind] for total in totals.values()), totals
    for kind, found in counts["WHIFLASH"]["kinds"].items():
        assert found["passes"], kind
        assert not found.get("not overlapped"), kind


def counted(file: Path, algorithm: str, *models: Path) -> dict[str, Any]:
    """Counts of `beside.py`, printed as they go into `docs/dev/findings.md`."""
    command = [
        sys.executable,
        str(Path(__file__).parent / "beside.py"),
        str(file),
        algorithm,
        *map(str, models),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, Any] = json.loads(file.read_text())
    for kind, launches in found["passes"].items():
        owners = Counter[str]()
        for launch, count in launches.items():
            name, line = launch.split()
            group = name if name == "graph" else "kernels" if "kernels/" in line else "operators and copies"
            owners[f"{'whiflash' if line.startswith('whiflash') else 'sglang'}: {group}"] += count
        print(algorithm, kind, sum(launches.values()), dict(owners))
    for kind, passes in found["kinds"].items():
        print(algorithm, kind, passes)
    return found

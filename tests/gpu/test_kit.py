"""The kit, rehearsed whole on a CPU in an environment of exactly the versions of the machine that it is for.

Needs that Python: `KIT_PYTHON` names it where `python3.12` does not.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import kit
import run

BESIDE = ("numpy<2.4",)
"""Triton 3.6 interprets with no newer one, which only a rehearsal does."""
UV = os.environ.get("UV", "uv")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kit")
    assert 10_000_000 < kit.build(root / "kit.tar.xz") <= kit.MOST
    with tarfile.open(root / "kit.tar.xz") as packed:
        packed.extractall(root / "there", filter="data")
    return root / "there"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("machine") / "environment"
    wanted = os.environ.get("KIT_PYTHON", kit.PYTHON)
    if subprocess.run([UV, "venv", "--quiet", "--python", wanted, str(where)], check=False).returncode:
        pytest.skip(f"no Python {wanted}; KIT_PYTHON may name one")
    into = ["--python", str(where / "bin" / "python")]
    subprocess.run([UV, "pip", "install", "--quiet", *into, *kit.MACHINE.split(), *BESIDE], check=True)
    return where / "bin" / "python"


def rehearsed(python: Path, unpacked: Path, *options: str) -> dict[str, Any]:
    """The records of a rehearsal there. Nothing of this checkout or environment is within its reach."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    records = unpacked.parent / "records"
    command = [str(python), "tests/gpu/run.py", "--records", str(records), *options]
    subprocess.run(command, cwd=unpacked, env=environment, check=False)
    found = map(json.loads, (path.read_text() for path in (records / "rehearsal").glob("*.json")))
    return {record["part"]: record for record in found if "part" in record}


@pytest.mark.evidence
@pytest.mark.timeout(3600)
def test_every_part_is_rehearsed_with_the_machines_versions(python: Path, unpacked: Path) -> None:
    records = rehearsed(python, unpacked, "--device", "cpu")
    left_out = {part.name for part in run.PARTS if "sgl_kernel.flash_attn" in part.needs}
    wanted = {part.name for part in run.PARTS if part.rehearsal is not None and not part.evidence}
    assert records.keys() == wanted
    bad = {name: one["tail"] for name, one in records.items() if one["status"] in ("failed", "timed out")}
    assert not bad, bad
    assert {name for name, one in records.items() if one["status"] == "left out"} == left_out & wanted
    versions = records["kernels-layers"]["versions"]
    assert (versions["torch"], versions["triton"], versions["python"][:4]) == ("2.11.0", "3.6.0", kit.PYTHON)


@pytest.mark.evidence
@pytest.mark.timeout(1800)
def test_stand_ins_serve_on_the_phantom_card(python: Path, unpacked: Path) -> None:
    record = rehearsed(python, unpacked, "--device", "phantom", "--only", "overlap-triton")["overlap-triton"]
    assert record["status"] == "passed", record["tail"]


@pytest.mark.evidence
def test_nothing_in_it_says_where_it_was_made(unpacked: Path) -> None:
    here = [str(path).encode() for path in (Path.home(), run.ROOT, sys.prefix)]
    files = [path for path in unpacked.rglob("*") if path.is_file()]
    assert len(files) > 1000
    assert not [path for path in files if any(place in path.read_bytes() for place in here)]
    assert not [path for path in files if path.name in ("direct_url.json", "uv.lock")]

"""The kit, rehearsed whole on a CPU in an environment of exactly the versions of the machine that it is for.

Needs that Python: `KIT_PYTHON` names it where `python3.12` does not.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import kit
import pytest
import run

PAGE = run.ROOT / "docs" / "dev" / "thirty-minutes.md"
BESIDE = ("numpy<2.4",)
"""Triton 3.6 interprets with no newer one, which only a rehearsal does."""
UV = os.environ.get("UV", "uv")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The machine's folder: the runner and the kit's archive, as the page's commands name them."""
    root = tmp_path_factory.mktemp("kit")
    (root / "dist").mkdir()
    (root / "tests/gpu").mkdir(parents=True)
    shutil.copy(run.__file__, root / "tests/gpu")
    assert 30_000_000 < kit.build(root / "dist/gpu-kit.tar.xz") < 45_000_000
    return root


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("machine") / "environment"
    wanted = os.environ.get("KIT_PYTHON", kit.PYTHON)
    if subprocess.run([UV, "venv", "--quiet", "--python", wanted, str(where)], check=False).returncode:
        pytest.skip(f"no Python {wanted}; KIT_PYTHON may name one")
    into = ["--python", str(where / "bin" / "python")]
    subprocess.run([UV, "pip", "install", "--quiet", *into, *kit.MACHINE.split(), *BESIDE], check=True)
    return where / "bin" / "python"


def rehearsed(python: Path, where: Path, command: str, device: str) -> dict[str, Any]:
    """The records of a command in a rehearsal. Nothing of this checkout or environment is within its reach."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = shlex.split(command.replace("$OUT", str(where)))[1:]
    at = words.index("--within")
    del words[at : at + 2]  # a card's seconds
    if "--jobs" in words:
        words[words.index("--jobs") + 1] = "2"
    subprocess.run([str(python), *words, "--device", device], cwd=where, env=environment, check=False)
    found = map(json.loads, (path.read_text() for path in (where / "dist/records/rehearsal").glob("*.json")))
    return {record["part"]: record for record in found if "part" in record}


COMMANDS = [line.strip() for line in PAGE.read_text().splitlines() if " --kit " in line]


@pytest.mark.evidence
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("command", "device"),
    [*((command, "cpu") for command in COMMANDS), (COMMANDS[0].rpartition(" ")[0] + " overlap-triton", "phantom")],
)
def test_commands_of_the_page_run_with_the_machines_versions(
    python: Path, there: Path, command: str, device: str
) -> None:
    records = rehearsed(python, there, command, device)
    wanted = {part.name for part in run.named(command.rpartition(" ")[2]) if part.rehearsal is not None}
    assert records.keys() >= wanted
    bad = {name: records[name]["tail"] for name in wanted if records[name]["status"] != "passed"}
    assert not bad, bad
    versions = records[min(wanted)]["versions"]
    assert (versions["torch"], versions["triton"], versions["python"][:4]) == ("2.11.0", "3.6.0", kit.PYTHON)
    assert (there / "records.tgz").stat().st_size


@pytest.mark.evidence
def test_nothing_in_it_says_where_it_was_made(there: Path, tmp_path: Path) -> None:
    with tarfile.open(there / "dist/gpu-kit.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    here = [str(path).encode() for path in (Path.home(), run.ROOT, sys.prefix)]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".so"]
    assert len(files) > 1000
    assert not [path for path in files if any(place in path.read_bytes() for place in here)]
    assert not [path for path in files if path.name in ("direct_url.json", "uv.lock")]

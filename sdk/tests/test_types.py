"""A user's program passes strict type checkers, with the openai that is installed; `make check` asks mypy with ours."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import whiflash_sdk

PACKAGES = Path(whiflash_sdk.__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [["mypy", "--strict", "--config-file=", "--cache-dir=.mypy"], ["basedpyright", f"--pythonpath={sys.executable}"]],
    ids=["mypy", "pyright"],
)
@pytest.mark.skipif(
    find_spec("basedpyright") is None, reason="needs basedpyright; the matrix of `make evidence` installs it"
)
def test_a_users_program_is_typed(command: list[str], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text((Path(__file__).parent / "typed_program.py").read_text("utf-8"))
    (tmp_path / "pyrightconfig.json").write_text(f'{{"typeCheckingMode": "strict", "extraPaths": ["{PACKAGES}"]}}')
    line = [sys.executable, "-m", *command, "program.py"]
    environment = {**os.environ, "MYPYPATH": str(PACKAGES)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

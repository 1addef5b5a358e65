"""The SDK's own tests again, in throw-away environments: oldest and newest openai, newest frameworks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SDK = Path(__file__).resolve().parents[1]


@pytest.mark.evidence
@pytest.mark.parametrize(
    "requirements",
    [
        pytest.param(["openai==2.0.0", f"-e{SDK}"], id="oldest-openai"),
        pytest.param(["openai>=3", f"-e{SDK}"], id="newest-openai"),
        pytest.param([f"-e{SDK}[adapters]"], id="newest-frameworks"),
    ],
)
def test_passes_in_its_own_environment(requirements: list[str], tmp_path: Path) -> None:
    uv = shutil.which("uv")
    assert uv, "this test builds environments with uv"
    asked = [part for one in [*requirements, "pytest"] for part in _with(one)]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [
        uv,
        "run",
        "--isolated",
        "--no-project",
        "--no-config",
        "--python",
        python,
        *asked,
        "pytest",
        "-q",
    ]
    options = ["--import-mode=importlib", "-p", "no:cacheprovider", "-W", "ignore", "-m", "not evidence"]
    line = [*command, *options, "--rootdir", str(SDK), str(SDK / "tests")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    if "adapters" in requirements[-1]:
        assert "skipped" not in done.stdout.lower(), done.stdout[-1000:]


def _with(requirement: str) -> tuple[str, str]:
    return ("--with-editable", requirement[2:]) if requirement.startswith("-e") else ("--with", requirement)

"""The SDK's own tests again, in throw-away environments: oldest and newest openai, newest frameworks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SDK = Path(__file__).resolve().parents[1]
TRACING = ("opentelemetry-sdk", "openinference-instrumentation-openai")
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("requirements", "python"),
    [
        pytest.param(["openai==2.0.0", f"-e{SDK}"], THIS_PYTHON, id="oldest-openai"),
        pytest.param(["openai>=3", f"-e{SDK}"], THIS_PYTHON, id="newest-openai"),
        pytest.param([f"-e{SDK}[adapters]"], THIS_PYTHON, id="newest-frameworks"),
        pytest.param([f"-e{SDK}"], "3.10", id="oldest-python"),
    ],
)
def test_passes_in_its_own_environment(requirements: list[str], python: str, tmp_path: Path) -> None:
    uv = shutil.which("uv")
    assert uv, "this test builds environments with uv"
    isolated = [uv, "run", "--isolated", "--no-project", "--no-config", "--python", python]
    found = subprocess.run([*isolated, "python", "-V"], cwd=tmp_path, capture_output=True, text=True)
    if found.returncode != 0 and python != THIS_PYTHON:
        pytest.skip(f"no Python {python} here, and none could be fetched: {found.stderr.strip()[-200:]}")
    asked = [part for one in [*requirements, "pytest", "mypy", "basedpyright", *TRACING] for part in _with(one)]
    options = ["--import-mode=importlib", "-p", "no:cacheprovider", "-W", "ignore", "-m", "not evidence"]
    line = [*isolated, *asked, "pytest", "-q", *options, "--rootdir", str(SDK), str(SDK / "tests")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    if "adapters" in requirements[-1]:
        assert "skipped" not in done.stdout.lower(), done.stdout[-1000:]


def _with(requirement: str) -> tuple[str, str]:
    return ("--with-editable", requirement[2:]) if requirement.startswith("-e") else ("--with", requirement)

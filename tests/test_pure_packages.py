"""Packages that decide and keep text import neither torch nor SGLang, so their tests take milliseconds."""

import subprocess
import sys
from pathlib import Path

import pytest

IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules["torch"] = sys.modules["sglang"] = None
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, f"{sys.argv[1]}."):
    importlib.import_module(module.name)
"""


@pytest.mark.parametrize("name", ["spans", "lookup", "routing", "telemetry"])
def test_pure_packages_import_without_torch(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, f"whiflash_sglang.{name}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_an_import_of_torch_is_found() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, "whiflash_sglang.models"], capture_output=True, text=True
    )
    assert "torch" in done.stderr


PURE_TESTS = (
    "spans",
    *(f"routing/test_{name}.py" for name in ("assign", "controller", "costs", "policies", "probing")),
    *(f"lookup/test_{name}.py" for name in ("copier", "index", "memory", "prediction")),
    "telemetry/test_publisher.py",
    "test_trace.py",
)


def test_their_tests_import_without_torch() -> None:
    collect = (
        "import sys; sys.modules['torch'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))",
        *("--collect-only", "-q", *PURE_TESTS),
    )
    done = subprocess.run(
        [sys.executable, "-c", *collect], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout

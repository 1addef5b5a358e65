"""Packages that decide and keep text import neither torch nor SGLang, so their tests take milliseconds."""

import subprocess
import sys

import pytest

IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules["torch"] = sys.modules["sglang"] = None
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, f"{sys.argv[1]}."):
    importlib.import_module(module.name)
"""


@pytest.mark.parametrize("name", ["spans", "routing", "telemetry"])
def test_pure_packages_import_without_torch(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, f"whiflash_sglang.{name}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

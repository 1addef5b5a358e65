"""Puts the checkout's package and this folder's modules on the path: nothing needs to be installed on a GPU."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "aot: compiles kernels ahead of time for several GPU architectures")

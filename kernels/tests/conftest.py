"""Puts the checkout's package and this folder's modules on the path: nothing needs to be installed on a GPU."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "aot: compiles kernels ahead of time for several GPU architectures")


@pytest.hookimpl(trylast=True)  # behind what a test's decorators say
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a `backend` runs on each, unless its decorators name some."""
    from kernel_backends import BACKENDS

    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and "backend" not in named:
        metafunc.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on shared cores: a second thread would mostly wait for its turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def within_bounds() -> Iterator[None]:
    """Under Triton's interpreter no kernel leaves the memory of its arguments."""
    from kernel_backends import INTERPRETING

    if INTERPRETING:
        from kernel_bounds import bounded

        with bounded():
            yield
    else:
        yield

"""Tiny models, without SGLang: one thread each. Two threads on two busy cores make these tests ten times slower."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from plain_engine import plain_engine
from tiny_models import tiny_target

from whiflash_train.target import TargetModel


@pytest.fixture(autouse=True, scope="module")
def _plain_engine() -> Iterator[None]:
    with plain_engine():
        yield


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("tiny") / "target")


@pytest.fixture(scope="module")
def target(path: Path) -> TargetModel:
    return TargetModel(path, device=torch.device("cpu"), dtype=torch.float32)

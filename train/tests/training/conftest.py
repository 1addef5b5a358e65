"""Tiny models, without SGLang: one thread each. Two threads on two busy cores make these tests ten times slower."""

from collections.abc import Iterator

import pytest
import torch
from plain_engine import plain_engine


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

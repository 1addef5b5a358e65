"""A phantom card for every test that asks for one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "learn"))

from card import phantom
from streams import Streams


@pytest.fixture
def world() -> Iterator[Streams]:
    with phantom() as found:
        yield found

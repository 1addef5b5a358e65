"""A phantom card for every test that asks for one."""

from collections.abc import Iterator

import pytest
from card import phantom
from streams import Streams


@pytest.fixture
def world() -> Iterator[Streams]:
    with phantom() as found:
        yield found

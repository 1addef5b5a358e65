"""Fixtures: a fake server of each test's own, so that its capabilities are asked again; a stopped clock."""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

sys.path.insert(0, str(Path(__file__).parent))

from fake_server import Clock, FakeServer, serving

import whiflash_sdk  # noqa: F401

PROBE_SECONDS = 24 * 3600.0
"""A wait that only this ends hangs, and the test's own limit ends it long before."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that answers expire by. However slow the machine is, none does and no probe gives up by itself.

    Nothing is known of any server at first: ports come again.
    """
    made = Clock()
    sys.modules["whiflash_sdk.trace"].STREAMS.clear()
    module = sys.modules["whiflash_sdk.capabilities"]
    for name, value in {"now": made, "PROBE_SECONDS": PROBE_SECONDS, "_servers": {}, "_warned": set()}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys.modules["whiflash_sdk.errors"], "_failed", [])
    return made


@pytest.fixture
def client(server: FakeServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.base_url, api_key="key", max_retries=2, timeout=None) as made:
        yield made


@pytest.fixture
def async_client(server: FakeServer) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=server.base_url, api_key="key", timeout=None)


@pytest.fixture
def ran(async_client: AsyncOpenAI) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine that asks with `async_client`, which is closed behind it."""

    async def closing(main: Coroutine[Any, Any, Any]) -> Any:
        async with async_client:
            return await main

    return lambda main: asyncio.run(closing(main))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--evidence", default=False):
        skip = pytest.mark.skip(reason="full matrix; run `make evidence`")
        for item in items:
            if "evidence" in item.keywords:
                item.add_marker(skip)

"""The Responses API: hints and predictions go where a server says that it reads them, and nowhere else."""

import asyncio
from typing import Any

import pytest
from fake_server import CAPABILITIES, FakeServer
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import Hints, agent, predict, wrap

TOOL: Any = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {}},
    "strict": False,
}
ASKED: dict[str, Any] = {"model": "m", "input": "Rename x.", "tools": [TOOL]}


@pytest.fixture
def reading(server: FakeServer) -> FakeServer:
    server.capabilities = {**CAPABILITIES, "routes": ["chat/completions", "completions", "responses"]}
    return server


def test_what_is_said_goes_out_and_the_server_derives_the_rest(client: OpenAI, reading: FakeServer) -> None:
    wrap(client, agent="a", trace="full")
    with predict("x = 1"):
        client.responses.create(**ASKED, extra_body=Hints(lookup="context").extra_body({"top_k": 3}))
    client.responses.create(**ASKED)
    first, second = reading.bodies
    assert first["prediction"] == {"type": "content", "content": "x = 1"}
    assert first["top_k"] == 3
    assert reading.wire(0) == {"agent": "a", "lookup": "context", "spans": []}
    assert reading.wire(1) == {"agent": "a", "spans": []}
    assert "prediction" not in second


def test_asynchronously_too(async_client: AsyncOpenAI, reading: FakeServer) -> None:
    wrap(async_client)
    with agent("b"):
        asyncio.run(async_client.responses.create(**ASKED))
    assert reading.wire()["agent"] == "b"


@pytest.mark.filterwarnings("ignore::whiflash_sdk.UnsupportedServerWarning")
@pytest.mark.parametrize("status", [200, 404])
def test_a_server_that_does_not_read_it_gets_what_the_call_said(
    client: OpenAI, server: FakeServer, status: int
) -> None:
    server.capabilities_status = status
    wrap(client, agent="a")
    with predict("x = 1"):
        client.responses.create(**ASKED, extra_body={"top_k": 3})
    assert server.bodies == [{**ASKED, "top_k": 3}]

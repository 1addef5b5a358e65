"""The Responses API: hints and predictions go where a server says that it reads them, and nowhere else."""

import asyncio
from typing import Any

import pytest
from fake_server import CAPABILITIES, TRACE, FakeServer
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import Hints, Trace, agent, collect, predict, routing, wrap

TOOL: Any = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {}},
    "strict": False,
}
ASKED: dict[str, Any] = {"model": "m", "input": "Rename x.", "tools": [TOOL]}
EXPECTED = Trace.model_validate(TRACE)


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
    assert reading.wire(0) == {"agent": "a", "lookup": "context", "trace": "full"}
    assert reading.wire(1) == {"agent": "a", "trace": "full"}
    assert "prediction" not in second


def test_traces_are_asked_for_and_read_as_of_chats(client: OpenAI, reading: FakeServer) -> None:
    wrap(client)
    with collect() as collected:
        response = client.responses.create(**ASKED)
        stream = client.responses.create(**ASKED, stream=True)
        events = list(stream)
        with client.responses.stream(**ASKED) as helper:
            helper.get_final_response()
        raw = client.responses.with_raw_response.create(**ASKED)
    assert [event.type for event in events] == ["response.created", "response.completed"]
    for answer in (response, stream, events[-1], helper, raw):
        assert routing(answer) == EXPECTED
    assert [(trace.model, trace.response_id, trace.arms) for trace in collected.traces] == [
        ("m", "r0", EXPECTED.arms)
    ] * 4
    assert all(reading.wire(index)["trace"] is True for index in range(4))
    wrap(client.with_options(), trace=False).responses.create(**ASKED)
    assert "trace" not in reading.hints()


def test_asynchronously_too(async_client: AsyncOpenAI, reading: FakeServer) -> None:
    wrap(async_client)

    async def ask() -> Any:
        with agent("b"), collect() as collected:
            response = await async_client.responses.create(**ASKED)
            stream = await async_client.responses.create(**ASKED, stream=True)
            assert [event.type async for event in stream][-1] == "response.completed"
        await async_client.close()
        return routing(response), routing(stream), *(trace.arms for trace in collected.traces)

    assert asyncio.run(ask()) == (EXPECTED, EXPECTED, EXPECTED.arms, EXPECTED.arms)
    assert reading.wire(0)["agent"] == reading.wire(1)["agent"] == "b"


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

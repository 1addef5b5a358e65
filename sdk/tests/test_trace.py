"""`routing` on everything that can carry a trace, streams included."""

import asyncio
from typing import Any

import pytest
from fake_server import TRACE, FakeServer
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import Trace, TraceError, routing, traced, wrap

MESSAGES: Any = [{"role": "user", "content": "Where?"}]


def test_the_trace_is_typed(client: OpenAI) -> None:
    trace = routing(wrap(client).chat.completions.create(model="m", messages=MESSAGES))
    assert isinstance(trace, Trace)
    assert (trace.policy, trace.switches, trace.rounds, trace.tokens) == ("auto", 1, 3, 14)
    assert trace.acceptance_length == pytest.approx(14 / 3)
    assert [(s.arm, s.tokens, s.acceptance_length, s.span) for s in trace.stretches] == [
        ("ar", 6, 3.0, None),
        ("lookup", 8, 8.0, "json"),
    ]
    assert trace.arms["lookup"].acceptance_length == 8.0


def test_raw_responses_completions_and_json_carry_it_too(client: OpenAI) -> None:
    wrap(client)
    raw = client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
    text = client.completions.create(model="m", prompt="x")
    expected = Trace.model_validate(TRACE)
    assert routing(raw) == routing(text) == routing(text.model_dump()) == expected
    assert routing({"text": "x", "meta_info": {"whiflash": TRACE}}) == expected


def test_streams_pass_through_and_keep_the_trace(client: OpenAI) -> None:
    wrap(client)
    stream = traced(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
    assert routing(stream) is None
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text.strip() == '{"city": "Zürich"}'
    assert routing(stream) == Trace.model_validate(TRACE)


def test_completion_streams_keep_the_trace(
    client: OpenAI, async_client: AsyncOpenAI, server: FakeServer
) -> None:
    stream = traced(wrap(client).completions.create(model="m", prompt="x", stream=True))
    assert "".join(c.choices[0].text for c in stream if c.choices).strip() == '{"city": "Zürich"}'
    assert routing(stream) == Trace.model_validate(TRACE)

    async def main() -> Trace | None:
        asked = wrap(async_client).completions.create(model="m", prompt="x", stream=True)
        other = traced(await asked)
        assert len([chunk async for chunk in other]) == 3
        await async_client.close()
        return routing(other)

    assert asyncio.run(main()) == Trace.model_validate(TRACE)
    assert all(body["stream"] and "whiflash" in body["custom_params"] for body in server.bodies)


def test_event_streams_keep_the_trace(client: OpenAI) -> None:
    with wrap(client).chat.completions.stream(model="m", messages=MESSAGES) as events:
        seen = traced(events)
        assert [event.type for event in seen].count("chunk") == 4
    assert routing(seen) == Trace.model_validate(TRACE)


def test_async_streams_keep_the_trace(async_client: AsyncOpenAI) -> None:
    async def main() -> Trace | None:
        asked = wrap(async_client).chat.completions.create(model="m", messages=MESSAGES, stream=True)
        stream = traced(await asked)
        assert len([chunk async for chunk in stream]) == 4
        await async_client.close()
        return routing(stream)

    assert asyncio.run(main()) == Trace.model_validate(TRACE)


def test_choices_have_traces_of_their_own(client: OpenAI, server: FakeServer) -> None:
    server.trace = [{**TRACE, "choice": 1, "policy": "entropy"}, TRACE]
    response = wrap(client).chat.completions.create(model="m", messages=MESSAGES, n=2)
    found = [routing(response, choice) for choice in range(3)]
    assert [trace and trace.policy for trace in found] == ["auto", "entropy", None]


@pytest.mark.parametrize(
    "broken", [{}, {**TRACE, "version": 2}, {**TRACE, "rounds": -1}, {**TRACE, "stretches": [{}]}, "text", 3]
)
def test_a_broken_trace_is_named(client: OpenAI, server: FakeServer, broken: Any) -> None:
    server.trace = broken
    response = wrap(client).chat.completions.create(model="m", messages=MESSAGES)
    with pytest.raises(TraceError, match="trace"):
        routing(response)


@pytest.mark.parametrize(
    "response", [None, {}, {"sglext": None}, {"sglext": {}}, {"meta_info": {"id": 1}}, "x"]
)
def test_no_trace_is_none(response: object) -> None:
    assert routing(response) is None


def test_no_rounds_is_no_division(client: OpenAI) -> None:
    empty = Trace.model_validate({"version": 1, "policy": "none", "rounds": 0, "tokens": 0})
    assert empty.acceptance_length == 0.0

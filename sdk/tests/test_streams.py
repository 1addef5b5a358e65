"""Streams of a wrapped client: its own, with nothing among their items that others do not send."""

import gc
import inspect
import sys
import threading
from itertools import count
from typing import Any

import pytest
from fake_server import ASKED, CAPABILITIES, EXPECTED, ROUTES, FakeServer, meanwhile
from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream

from whiflash_sdk import agent, collect, routing, streaming, wrap

trace: Any = sys.modules["whiflash_sdk.trace"]
CLOSES_ITSELF = "finally" in inspect.getsource(Stream.__stream__)
"""Newer clients close a response as its generator is collected, in whatever thread."""


def read(stream: Any) -> str:
    """As loops are written everywhere: every item has a first choice."""
    return "".join(text_of(chunk) for chunk in stream)


def text_of(chunk: Any) -> str:
    choice = chunk.choices[0]
    return str(choice.text if hasattr(choice, "text") else choice.delta.content or "")


def test_every_item_has_a_choice_and_the_trace_is_kept(client: OpenAI, server: FakeServer) -> None:
    wrap(client)
    prompt: Any = {"model": "m", "prompt": "x"}
    for ask, body in ((client.chat.completions.create, ASKED), (client.completions.create, prompt)):
        stream = ask(**body, stream=True)
        assert isinstance(stream, Stream)
        assert routing(stream) is None
        assert read(stream).strip() == server.content
        assert routing(stream) == EXPECTED
        assert stream.response.is_closed


def test_it_is_left_as_the_clients_own(client: OpenAI) -> None:
    with wrap(client).chat.completions.create(**ASKED, stream=True) as stream:
        assert next(iter(stream)).choices
        assert stream.response.status_code == 200
    assert stream.response.is_closed
    stream = client.chat.completions.create(**ASKED, stream=True)
    next(stream)
    stream.close()
    assert stream.response.is_closed


def test_raw_and_streaming_views_and_the_event_helper(client: OpenAI, server: FakeServer) -> None:
    wrap(client)
    raw = client.chat.completions.with_raw_response.create(**ASKED, stream=True)
    assert read(raw.parse()).strip() == server.content
    assert routing(raw) == EXPECTED
    with client.chat.completions.with_streaming_response.create(**ASKED, stream=True) as response:
        assert read(response.parse()).strip() == server.content
        assert routing(response) == EXPECTED
    with client.chat.completions.stream(**ASKED) as events:
        chunks = [event.chunk for event in events if event.type == "chunk"]
        assert events.get_final_completion().choices[0].message.content
        assert routing(events.get_final_completion()) == EXPECTED
    assert all(chunk.choices for chunk in chunks)
    assert routing(events) == EXPECTED


def test_a_final_answer_has_its_trace_when_the_stream_is_gone(client: OpenAI) -> None:
    def final() -> object:
        with wrap(client).chat.completions.stream(**ASKED) as events:
            return events.get_final_completion()

    answer = final()
    gc.collect()
    assert routing(answer) == EXPECTED


def test_streams_that_begin_meanwhile_make_room_too() -> None:
    names = map(str, count())
    for _ in range(trace.MOST_STREAMS):
        trace.keep_stream(next(names), None)
    with meanwhile(lambda: trace.STREAMS.setdefault(next(names))):
        trace.keep_stream("mine", None)
    trace.keep_stream("last", None)
    assert len(trace.STREAMS) == trace.MOST_STREAMS


def test_async_streams_do_the_same(async_client: AsyncOpenAI, server: FakeServer, ran: Any) -> None:
    async def main() -> None:
        create = wrap(async_client).chat.completions.create
        stream = await create(**ASKED, stream=True)
        assert isinstance(stream, AsyncStream)
        assert "".join([text_of(chunk) async for chunk in stream]).strip() == server.content
        assert routing(stream) == EXPECTED
        async with await create(**ASKED, stream=True) as stream:
            async for chunk in stream:
                assert chunk.choices
                break
        assert stream.response.is_closed
        raw = await async_client.chat.completions.with_raw_response.create(**ASKED, stream=True)
        parsed = raw.parse()
        assert "".join([text_of(chunk) async for chunk in parsed]).strip() == server.content
        assert routing(raw) == EXPECTED
        view = async_client.chat.completions.with_streaming_response.create(**ASKED, stream=True)
        async with view as response:
            parsed = await response.parse()
            assert "".join([text_of(chunk) async for chunk in parsed]).strip() == server.content
            assert routing(parsed) == EXPECTED
            assert routing(response) == EXPECTED
        async with async_client.chat.completions.stream(**ASKED) as events:
            chunks = [event.chunk async for event in events if event.type == "chunk"]
        assert all(chunk.choices for chunk in chunks)
        assert routing(events) == EXPECTED

    ran(main())


def test_responses_are_read_as_chats_are(
    client: OpenAI, async_client: AsyncOpenAI, server: FakeServer, ran: Any
) -> None:
    server.capabilities = {**CAPABILITIES, "routes": ROUTES}
    asked: Any = {"model": "m", "input": "Rename x."}
    wrap(client), wrap(async_client)

    async def main() -> tuple[Any, ...]:
        response = await async_client.responses.create(**asked)
        stream = await async_client.responses.create(**asked, stream=True)
        assert [event.type async for event in stream][-1] == "response.completed"
        return response, stream

    with agent("b"), collect() as collected:
        response = client.responses.create(**asked)
        stream = client.responses.create(**asked, stream=True)
        events = list(stream)
        with client.responses.stream(**asked) as helper:
            helper.get_final_response()
        raw = client.responses.with_raw_response.create(**asked)
        answers = (response, stream, events[-1], helper, raw, *ran(main()))
    assert [event.type for event in events] == ["response.created", "response.completed"]
    assert [routing(answer) for answer in answers] == [EXPECTED] * 7
    told = [(trace.model, trace.response_id, trace.agent, trace.arms) for trace in collected.traces]
    assert told == [("m", "r0", "b", EXPECTED.arms)] * 6
    assert server.said("trace") == [True] * 6


@pytest.mark.parametrize("lost", ["never read", "in a loop", "in a cycle"])
def test_a_stream_that_is_lost_is_closed_elsewhere(client: OpenAI, lost: str) -> None:
    """The collector may run under the lock that closing takes; a thread of its own can wait for it."""
    wrap(client)
    closers: list[threading.Thread] = []
    done = threading.Event()

    def loop() -> None:
        stream = client.chat.completions.create(**ASKED, stream=True)
        body = stream.response.stream._stream._stream  # type: ignore[attr-defined]
        original: Any = body.close

        def close() -> None:
            original()
            closers.append(threading.current_thread())
            done.set()

        body.close = close
        keep: list[Any] = [stream]
        if lost == "in a cycle":
            keep.append(keep)
        for _ in stream if lost != "never read" else ():
            raise KeyError
        raise KeyError

    with pytest.raises(KeyError):
        loop()
    gc.collect()
    assert done.wait()
    assert CLOSES_ITSELF or threading.current_thread() not in closers


def test_a_response_may_outlive_its_stream(client: OpenAI) -> None:
    """An endpoint that passes bytes on keeps the response alone."""
    response = wrap(client).chat.completions.create(**ASKED, stream=True).response
    gc.collect()
    closed = threading.Event()
    streaming._lost.put(closed.set)  # behind whatever the collector has put there
    assert closed.wait()
    assert b"[DONE]" in b"".join(response.iter_bytes())


def test_a_hook_that_reads_a_stream_leaves_no_chunk_of_ours(client: OpenAI) -> None:
    client._client.event_hooks["response"] = [lambda response: response.read()]
    stream = wrap(client).chat.completions.create(**ASKED, stream=True)
    assert all(chunk.choices for chunk in stream)
    assert routing(stream) == EXPECTED

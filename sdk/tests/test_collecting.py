"""`collect`: traces of calls whose responses somebody else keeps."""

import asyncio
import threading
from contextvars import copy_context
from typing import Any

import pytest
from fake_server import TRACE, FakeServer
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import Trace, TraceError, collect, wrap

ASKED: Any = {"model": "m", "messages": [{"role": "user", "content": "Where?"}]}
EXPECTED = Trace.model_validate(TRACE)


def test_every_kind_of_response_is_seen(client: OpenAI) -> None:
    wrap(client).chat.completions.create(**ASKED)
    with collect() as collected:
        client.chat.completions.create(**ASKED)
        client.chat.completions.with_raw_response.create(**ASKED)
        for _ in client.chat.completions.create(**ASKED, stream=True):
            pass
        with client.chat.completions.stream(**ASKED) as events:
            events.until_done()
        client.completions.create(model="m", prompt="x")
        with collect() as inner:
            client.with_options(timeout=9).beta.chat.completions.parse(**ASKED)
    client.chat.completions.create(**ASKED)
    assert collected.traces == [EXPECTED] * 6
    assert inner.traces == [EXPECTED]


def test_a_stream_left_open_is_seen_when_it_ends(client: OpenAI) -> None:
    with collect() as collected:
        stream = wrap(client).chat.completions.create(**ASKED, stream=True)
    assert collected.traces == []
    assert len(list(stream)) == 4
    assert collected.traces == [EXPECTED]


def test_raw_streams_pass_untouched(client: OpenAI) -> None:
    with collect():
        raw = wrap(client).chat.completions.with_raw_response.create(**ASKED, stream=True)
        with client.chat.completions.with_streaming_response.create(**ASKED) as streamed:
            body = streamed.json()
    assert len(list(raw.parse())) == 4
    assert body["object"] == "chat.completion"  # type: ignore[index]


def test_async_calls_are_seen(async_client: AsyncOpenAI) -> None:
    async def main() -> list[Trace]:
        wrap(async_client)
        with collect() as collected:
            await asyncio.gather(*(async_client.chat.completions.create(**ASKED) for _ in range(2)))
            async for _ in await async_client.chat.completions.create(**ASKED, stream=True):
                pass
        await async_client.close()
        return collected.traces

    assert asyncio.run(main()) == [EXPECTED] * 3


def test_threads_started_with_the_context_are_seen(client: OpenAI) -> None:
    wrap(client)
    with collect() as collected:
        asking = lambda: client.chat.completions.create(**ASKED)  # noqa: E731
        thread = threading.Thread(target=copy_context().run, args=(asking,))
        thread.start()
        thread.join()
    assert collected.traces == [EXPECTED]


def test_a_broken_trace_never_breaks_the_call(client: OpenAI, server: FakeServer) -> None:
    server.trace = {"version": "x"}
    with collect() as collected:
        assert wrap(client).chat.completions.create(**ASKED).choices
    with pytest.raises(TraceError, match=r"trace\.version"):
        collected.traces  # noqa: B018

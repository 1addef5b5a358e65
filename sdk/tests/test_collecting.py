"""`collect`: traces of calls whose responses somebody else keeps."""

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from datetime import datetime, timezone
from itertools import count
from typing import Any

import pytest
from fake_server import ASKED, EXPECTED, FakeServer, ask, meanwhile
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import Collected, Hints, Trace, TraceError, agent, collect, wrap
from whiflash_sdk.collecting import start


def seen(collected: Collected) -> list[Trace]:
    """The traces without the calls that they are of."""
    return [Trace.model_validate(trace.model_dump()) for trace in collected.traces]


def from_threads(client: OpenAI, before: ThreadPoolExecutor) -> int:
    """Ask from threads and tasks of every kind; return how often."""
    thread = threading.Thread(target=ask, args=(client,))
    thread.start()
    thread.join()
    with ThreadPoolExecutor(2) as inside:
        for pool in (before, inside):
            list(pool.map(ask, [client, client]))
    asyncio.run(asyncio.to_thread(ask, client))
    before.submit(lambda: list(client.chat.completions.create(**ASKED, stream=True))).result()
    return 7


def test_every_thread_of_a_client_is_seen(client: OpenAI, server: FakeServer) -> None:
    """Pools made before the block too, and clients made from it; not other clients."""
    wrap(client)
    with ThreadPoolExecutor(2) as before, OpenAI(base_url=server.base_url, api_key="other") as other:
        before.submit(ask, client).result()
        with collect(client) as collected:
            asked = from_threads(client, before)
            before.submit(ask, client.with_options(max_retries=1)).result()
            before.submit(ask, wrap(other)).result()
            ask(other)
        before.submit(ask, client).result()
    assert seen(collected) == [EXPECTED] * (asked + 1)


def test_a_call_counts_once(client: OpenAI, async_client: AsyncOpenAI) -> None:
    with collect(wrap(client), client, wrap(async_client)) as collected, collect() as around:
        ask(client)
        asyncio.run(async_client.completions.create(model="m", prompt="x"))  # type: ignore[arg-type]
    assert seen(collected) == seen(around) == [EXPECTED] * 2


@pytest.mark.parametrize("by_client", [True, False])
def test_blocks_side_by_side_do_not_mix(client: OpenAI, by_client: bool) -> None:
    """By a client of each block's own where the block has threads of its own, by context where it has none."""
    wrap(client)
    both_open, asked = threading.Barrier(2), threading.Barrier(2)

    def job(calls: int) -> int:
        mine = client.with_options()
        with ThreadPoolExecutor(2) as pool, collect(*([mine] if by_client else [])) as collected:
            both_open.wait()
            for _ in range(calls):
                pool.submit(ask, mine).result() if by_client else ask(mine)
            asked.wait()
        return len(collected.traces)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(job, [1, 3])) == [1, 3]


def test_tasks_started_inside_are_seen_and_those_beside_are_not(client: OpenAI) -> None:
    wrap(client)

    async def job(calls: int) -> int:
        with collect() as collected:
            task = asyncio.create_task(asyncio.to_thread(ask, client))
            for _ in range(calls):
                await asyncio.to_thread(ask, client)
        await task
        return len(collected.traces)

    async def both() -> list[int]:
        return await asyncio.gather(job(1), job(3))

    assert asyncio.run(both()) == [2, 4]


def test_threads_started_with_the_context_are_seen_and_others_as_python_has_it(client: OpenAI) -> None:
    wrap(client)
    with collect() as collected:
        for target in (copy_context().run, lambda asking, given: asking(given)):
            thread = threading.Thread(target=target, args=(ask, client))
            thread.start()
            thread.join()
    inherits = getattr(sys.flags, "thread_inherit_context", 0)
    assert seen(collected) == [EXPECTED] * (2 if inherits else 1)


def test_a_block_that_ends_meanwhile_takes_no_call_from_another(client: OpenAI) -> None:
    def calls(last: int) -> int:
        steps = count()
        with ExitStack() as ending:
            ending.enter_context(collect(wrap(client)))
            with collect(client) as collected, meanwhile(lambda: next(steps) != last or ending.close()):
                start(client, None)
        return len(collected._calls)

    assert [calls(last) for last in range(200)] == [1] * 200


def test_a_client_has_to_be_wrapped_and_forgets_its_blocks(client: OpenAI) -> None:
    with pytest.raises(TypeError, match=r"whiflash_sdk\.wrap"), collect(client):
        pass
    with pytest.raises(ZeroDivisionError), collect(wrap(client)) as collected:
        raise ZeroDivisionError
    ask(client)
    assert seen(collected) == []


def test_an_answer_of_the_http_library_and_json_are_collected_too(client: OpenAI) -> None:
    base = next(one for one in type(client._client).__mro__ if one.__name__ == "Client")
    library: Any = sys.modules[base.__module__.partition(".")[0]]
    with collect() as collected:
        for kind in (library.Response, object):
            wrap(client).post("/chat/completions", cast_to=kind, body=ASKED)
    assert seen(collected) == [EXPECTED] * 2


def test_a_broken_trace_never_breaks_the_call(client: OpenAI, server: FakeServer) -> None:
    server.trace = {"version": "x"}
    with collect() as collected:
        assert wrap(client).chat.completions.create(**ASKED).choices
    with pytest.raises(TraceError, match=r"trace\.version"):
        collected.traces  # noqa: B018


def test_a_trace_names_its_call(client: OpenAI) -> None:
    """This holds for every kind of response; what begins first is first, though it ends last."""
    before = datetime.now(timezone.utc)
    wrap(client, agent="planner")
    with collect() as collected:
        stream = client.chat.completions.create(**ASKED, stream=True)
        with agent("coder"):
            client.chat.completions.with_raw_response.create(**{**ASKED, "model": "second"})
            raw = client.completions.with_raw_response.create(model="third", prompt="x", stream=True)
        client.completions.create(model="fourth", prompt="x", extra_body=Hints(agent=None).extra_body())
        for items in (raw.parse(), stream):
            list(items)
    traces = collected.traces
    named = [("m", "planner"), ("second", "coder"), ("third", "coder"), ("fourth", None)]
    assert [(trace.model, trace.agent, trace.response_id) for trace in traces] == [(*one, "r0") for one in named]
    assert before <= traces[0].started
    assert [trace.started for trace in traces] == sorted(trace.started for trace in traces)
    assert all(trace.started <= trace.ended <= traces[0].ended for trace in traces)
    assert "policy auto" in str(traces[0])


def test_concurrent_calls_come_in_the_order_they_started(async_client: AsyncOpenAI, ran: Any) -> None:
    async def main() -> list[str | None]:
        create = wrap(async_client, agent=lambda: "a", capabilities=True).chat.completions.create
        with collect() as collected:
            streams = [await create(**{**ASKED, "model": name}, stream=True) for name in "abc"]
            assert collected.traces == []
            for stream in reversed(streams):
                async for _ in stream:
                    pass
        assert {trace.agent for trace in collected.traces} == {"a"}
        return [trace.model for trace in collected.traces]

    assert ran(main()) == ["a", "b", "c"]

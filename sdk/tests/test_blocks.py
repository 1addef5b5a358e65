"""Blocks whose two halves run in different contexts, as frameworks run the halves of a generator."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import anyio.to_thread
import pytest
from fake_server import ASKED, FakeServer
from openai import AsyncOpenAI

from whiflash_sdk import Hints, Session, Span, agent, collect, hinted, predict, spans, wrap
from whiflash_sdk.blocks import predicted_text

BLOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "hinted": lambda: hinted(Hints(off=True)),
    "agent": lambda: agent("planner"),
    "predict": lambda: predict("a text"),
    "spans": spans.code,
    "collect": collect,
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_halves_of_a_generator_run_in_two_threads(block: Callable[[], Any]) -> None:
    """So FastAPI runs a `yield` dependency that is no coroutine."""

    def dependency() -> Iterator[None]:
        with block():
            yield

    async def request() -> None:
        halves = dependency()
        await anyio.to_thread.run_sync(next, halves)
        await anyio.to_thread.run_sync(next, halves, None)

    asyncio.run(request())


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_halves_of_an_async_generator_run_in_two_tasks(
    block: Callable[[], Any], async_client: AsyncOpenAI, server: FakeServer
) -> None:
    """So pytest-asyncio runs a fixture. Code that runs in the first half's context later is outside the block."""
    wrap(async_client)

    async def fixture() -> AsyncIterator[Any]:
        with block() as given:
            yield given

    async def ask() -> None:
        await async_client.chat.completions.create(**ASKED)

    async def main() -> Any:
        halves, ended, first = fixture(), asyncio.Event(), asyncio.Event()
        given: list[Any] = []

        async def setup() -> None:
            given.append(await anext(halves))
            await ask()
            first.set()
            await ended.wait()
            await ask()

        begun = asyncio.create_task(setup())
        waiting = asyncio.create_task(first.wait())
        await asyncio.wait((begun, waiting), return_when=asyncio.FIRST_COMPLETED)
        assert waiting.done() or begun.result()
        await asyncio.create_task(anext(halves, None))  # type: ignore[arg-type]
        ended.set()
        await begun
        await ask()
        return given[0]

    given = asyncio.run(main())
    inside, behind, outside = server.bodies
    assert behind == outside
    if block is BLOCKS["collect"]:
        assert len(given.traces) == 1
    else:
        assert inside != outside


def test_tasks_at_the_same_time_keep_their_own(async_client: AsyncOpenAI, server: FakeServer, ran: Any) -> None:
    """Also where two of them are inside the same session."""
    sessions = {name: Session(agent=name) for name in "ab"}
    of_all = (lambda name: sessions[name], predict, lambda name: hinted(Hints(spans=(Span(kind="code", begin=name),))))

    async def ask(name: str) -> None:
        with ExitStack() as blocks:
            for block in of_all:
                blocks.enter_context(block(name))
            await asyncio.sleep(0)
            await wrap(async_client).completions.create(model=name, prompt="x")
        await async_client.completions.create(model="none", prompt="x")

    async def main() -> None:
        await asyncio.gather(*map(ask, "aba"))

    ran(main())
    for index, body in enumerate(server.bodies):
        (begin,) = [span["begin"] for span in server.wire(index).get("spans", ())] or [None]
        said = [server.wire(index).get("agent"), begin, body.get("prediction", {}).get("content")]
        assert said == [None if body["model"] == "none" else body["model"]] * 3


def test_what_outlives_a_block_keeps_it(async_client: AsyncOpenAI, server: FakeServer) -> None:
    """A task that was started inside, where the block ends as it began; the blocks around it hold on."""
    wrap(async_client)

    async def ask(go: asyncio.Event) -> None:
        await go.wait()
        await async_client.chat.completions.create(**ASKED)

    async def main() -> None:
        go = asyncio.Event()
        with agent("outer"):
            with agent("inner"):
                begun = asyncio.create_task(ask(go))
            go.set()
            await begun
            await ask(go)

    asyncio.run(main())
    assert [server.hints(index)["agent"] for index in range(2)] == ["inner", "outer"]


def test_blocks_may_end_in_the_order_they_began() -> None:
    def text(name: str) -> Iterator[None]:
        with predict(name):
            yield

    first, second = text("first"), text("second")
    next(first)
    next(second)
    first.close()
    assert predicted_text() == "second"
    second.close()
    assert predicted_text() is None

"""`Session(preview=True)`: while a tool runs, the next prompt goes to the server as far as it is known."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
from fake_server import CAPABILITIES, FakeServer
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import Session, async_http_client, collect, http_client, wrap
from whiflash_sdk.previews import LEAST, MARKER, StreamedResult

USER = {"role": "user", "content": "Do it."}
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"n": {}}}}}
ASKED: Any = {"model": "tiny", "messages": [USER], "tools": [TOOL]}


def until(does: Callable[[], bool]) -> None:
    while not does():
        time.sleep(0.01)


def tool_message(content: str) -> dict[str, str]:
    return {"role": "tool", "tool_call_id": "c0", "content": content}


def work(session: Session, server: FakeServer) -> None:
    """Check the previews after an answer that calls a tool."""
    until(lambda: len(server.bodies) == 2)
    first, preview = server.bodies
    call = {"id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"n": "2+2"}'}}
    answer = {"role": "assistant", "tool_calls": [call]}
    preview["messages"][1].pop("content", None)  # blank in a stream
    assert preview["messages"] == [USER, answer, tool_message(MARKER)]
    assert server.wire(1) == {"preview": MARKER, "learn": False}
    assert [preview[name] for name in ("max_tokens", "tools")] == [1, [TOOL]]
    for name in ("session_id", "cache_salt", "model"):
        assert preview[name] == first[name]
    with session.stream_result() as result:
        print("a line", file=result)
        assert len(server.bodies) == 2
        result.write("x" * LEAST)
        until(lambda: len(server.bodies) == 3)
    assert server.bodies[2]["messages"][2:] == [tool_message(result.text + MARKER)]
    assert result.text == "a line\n" + "x" * LEAST


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_a_turn_and_its_result_are_previewed(server: FakeServer, below: bool, stream: bool) -> None:
    server.capabilities = {**CAPABILITIES, "previews": True}
    given: Any = {"base_url": server.base_url, "api_key": "key"}
    session = Session(tenant="acme", agent="coder", preview=True)
    with OpenAI(**given, http_client=http_client() if below else None) as client:
        create = (client if below else wrap(client)).chat.completions.create
        with session, collect() as collected:
            answer = create(**ASKED, stream=stream)
            list(answer)
            work(session, server)
            create(**ASKED)
            until(lambda: len(server.bodies) == 5)
    assert [call.turn for call in collected._calls] == [None, None], "a call that is kept has no conversation"
    server.bodies.clear()

    async def main() -> None:
        client = AsyncOpenAI(**given, http_client=async_http_client() if below else None)
        async with client, session:
            answer = await (client if below else wrap(client)).chat.completions.create(**ASKED, stream=stream)
            if stream:
                async for _ in answer:
                    pass
            await asyncio.to_thread(work, session, server)  # a tool may run in a thread

    asyncio.run(main())


def test_a_long_result_is_sent_as_it_grows() -> None:
    result = StreamedResult(turn := Mock(), None)
    for _ in range(20_000):
        print("x" * 79, file=result)
    assert turn.send.call_count < 100


@pytest.mark.parametrize("case", ["not asked", "no agent", "older server", "no server of ours", "n", "refused"])
def test_without_previews_nothing_else_is_sent(server: FakeServer, client: OpenAI, case: str) -> None:
    server.capabilities = {**CAPABILITIES, "previews": case != "older server"}
    server.capabilities_status = 404 if case == "no server of ours" else 200
    server.refuses = {"max_tokens"} if case == "refused" else set()
    session = Session(agent=None if case == "no agent" else "coder", preview=case != "not asked")
    with session:
        create = wrap(client).chat.completions.create
        if case == "no server of ours":
            with pytest.warns(UserWarning, match="404"):
                create(**ASKED)
        else:
            create(**ASKED, **({"n": 2} if case == "n" else {}))
        for thread in threading.enumerate():
            if thread.name == "whiflash-preview":
                assert thread.daemon
                thread.join()
        with session.stream_result() as result:
            result.write("x" * LEAST * 2)
        assert result.text == "x" * LEAST * 2
        create(**ASKED)
    previews = [1] * (case == "refused")
    assert [body.get("max_tokens") for body in server.bodies][: 2 + len(previews)] == [None, *previews, None]

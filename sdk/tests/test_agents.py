"""Who asks: from the client, blocks and calls, what goes out, and to whom."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_server import CAPABILITIES, FakeServer
from openai import AsyncOpenAI, OpenAI
from pydantic import ValidationError

from whiflash_sdk import Capabilities, Hints, agent, wrap
from whiflash_sdk.hints import decode

MESSAGES: Any = [{"role": "user", "content": "Plan it."}]
SCOPE = {"agent", "query", "structure"}


def ask(client: OpenAI, **more: Any) -> None:
    client.chat.completions.create(model="m", messages=MESSAGES, **more)


def sent(server: FakeServer) -> list[Any]:
    """Who asked, in every request."""
    return [server.wire(index).get("agent") for index in range(len(server.bodies))]


def test_what_is_nearer_to_the_call_wins(client: OpenAI, server: FakeServer) -> None:
    wrap(client, agent="client")
    ask(client)
    with agent("outer"):
        ask(client)
        with agent("inner"):
            ask(client)
            ask(client, extra_body=Hints(agent="call").extra_body())
            ask(client, extra_body=Hints(agent=None).extra_body())
            client.with_options(max_retries=0).completions.create(model="m", prompt="x")
    ask(wrap(client.with_options(), agent="client", hints=Hints(agent="of the hints")))
    assert sent(server) == ["client", "outer", "inner", "call", None, "inner", "of the hints"]


def test_a_block_says_the_query_and_the_structure_too(client: OpenAI, server: FakeServer) -> None:
    wrap(client, agent="client")
    with agent("planner", query=0, structure=[("<plan>", "</plan>"), ("Answer:", None)]):
        ask(client)
        with agent("other"):
            ask(client, extra_body=Hints(query="second", trace=False).extra_body({"top_k": 1}))
    pairs = [["<plan>", "</plan>"], ["Answer:", None]]
    assert [{name: server.wire(i).get(name) for name in SCOPE} for i in range(2)] == [
        {"agent": "planner", "query": 0, "structure": pairs},
        {"agent": "other", "query": "second", "structure": pairs},
    ]
    assert server.bodies[1]["top_k"] == 1


def test_a_function_is_asked_at_every_call(client: OpenAI, server: FakeServer) -> None:
    names = iter(["one", None, "path/" * 20 + "end", "never"])
    told: Callable[[], str | None] = lambda: next(names)  # noqa: E731
    wrap(client, agent=told)
    for _ in range(3):
        ask(client)
    with agent("block"):
        ask(client)
    assert sent(server) == ["one", None, ("path/" * 20 + "end")[-64:], "block"]
    assert next(names) == "never", "nobody is asked where a name is said"


def test_servers_of_before_get_nothing_that_they_refuse(client: OpenAI, server: FakeServer) -> None:
    """Such a server refuses fields that it does not know."""
    server.capabilities = {key: value for key, value in CAPABILITIES.items() if key != "scopes"}
    wrap(client, agent="client")
    with agent("planner", query=1, structure=[("a", "b")]):
        ask(client)
        ask(client, extra_body=Hints(agent="call", off=True).extra_body())
    ask(client)
    assert not any(SCOPE & set(server.wire(index)) for index in range(3))
    assert server.hints(1)["off"] is True


def test_a_call_that_names_its_agent_in_the_body_is_given_no_other(
    client: OpenAI, server: FakeServer
) -> None:
    """AgentSpec's field and the hint name the same thing, and a server refuses a request with both."""
    wrap(client, agent=lambda: "framework", hints=Hints(query=1, structure=[("a", "b")]))
    ask(client, extra_body={"agent-id": "own", "query-id": 2})
    with agent("block"):
        ask(client, extra_body={"agent-id": "own"})
    ask(client, extra_body=Hints(agent="call").extra_body())
    assert not any(SCOPE & set(server.wire(index)) for index in range(2))
    assert server.wire(2)["agent"] == "call"


@pytest.mark.filterwarnings("ignore::whiflash_sdk.UnsupportedServerWarning")
def test_a_server_that_does_not_route_gets_nothing(client: OpenAI, server: FakeServer) -> None:
    server.capabilities_status = 404
    wrap(client, agent=lambda: "framework")
    with agent("planner", query=1):
        ask(client, extra_body=Hints(agent="call").extra_body())
    assert "custom_params" not in server.bodies[0]


def test_a_server_that_is_assumed_to_route_gets_every_name(client: OpenAI, server: FakeServer) -> None:
    wrap(client, capabilities=True, agent=lambda: "framework")
    ask(client)
    with agent("said"):
        ask(client)
    ask(wrap(client.with_options(), capabilities=True, agent="said too"))
    assert sent(server) == ["framework", "said", "said too"]


@pytest.mark.parametrize(
    "fields",
    [
        {"agent": ""},
        {"agent": "x" * 65},
        {"agent": "\ud800"},
        {"query": -1},
        {"query": True},
        {"query": 2**31},
        {"query": "x" * 65},
        {"structure": [("a", "b")] * 17},
        {"structure": [("", "b")]},
        {"structure": [("a",)]},
        {"structure": [(None, "b")]},
    ],
)
def test_what_the_server_would_refuse_is_refused_here(fields: Any) -> None:
    with pytest.raises(ValidationError):
        Hints(**fields)


def test_hints_come_back_as_they_were() -> None:
    hints = Hints(agent="a", query=3, structure=[["<x>", None]])  # type: ignore[list-item,arg-type]
    assert json.loads(hints.encode()) == {"agent": "a", "query": 3, "structure": [["<x>", None]]}
    assert decode(hints.encode()) == hints
    assert hints.without(["query", "spans"]) == Hints(agent="a", structure=(("<x>", None),))
    assert hints.without(["spans"]) is hints
    assert Capabilities(version=1).scopes == ()


def test_tasks_at_the_same_time_keep_their_own(async_client: AsyncOpenAI, server: FakeServer) -> None:
    wrap(async_client)

    async def one(name: str) -> None:
        with agent(name):
            await asyncio.sleep(0)
            await async_client.chat.completions.create(model=name, messages=MESSAGES)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(str(i)) for i in range(5)))

    asyncio.run(all_of_them())
    assert sent(server) == [body["model"] for body in server.bodies]

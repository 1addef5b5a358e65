"""`early_tools`: what starts, when, and who gets the outcome. The server ends no answer before the test lets it."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_server import FakeServer
from openai import AsyncOpenAI, OpenAI

import whiflash_sdk
from whiflash_sdk import early_tools, wrap
from whiflash_sdk.collecting import Call

QUESTION: Any = {"model": "m", "messages": [{"role": "user", "content": "2+2?"}], "stream": True}
SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}}
ASKED: Any = {
    **QUESTION,
    "tools": [{"type": "function", "function": {"name": "work_out", "parameters": SCHEMA}}],
}
ARGUMENTS = {"expression": "2+2"}


class Tool:
    """A function that notes each run, with its thread."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.ran = threading.Event()
        self.error: Exception | None = None

    def __call__(self, expression: str, digits: int = 2) -> str:
        """Work it out."""
        self.threads.append(threading.current_thread())
        self.ran.set()
        if self.error is not None:
            raise self.error
        return f"{eval(expression):.{digits}f}"

    @property
    def early(self) -> int:
        """How many of the runs were not the caller's."""
        return sum(thread is not threading.current_thread() for thread in self.threads)


@pytest.fixture
def tool() -> Tool:
    return Tool()


@pytest.fixture
def held(server: FakeServer) -> Iterator[threading.Event]:
    server.held = threading.Event()
    yield server.held
    server.held.set()


@pytest.mark.parametrize("routes", [True, False])
@pytest.mark.parametrize("below", [True, False])
def test_a_tool_runs_before_the_answer_ends_and_once(
    server: FakeServer, tool: Tool, held: threading.Event, routes: bool, below: bool
) -> None:
    """Below the client too, and whoever serves."""
    told: Any = {"base_url": server.base_url, "api_key": "key", "timeout": None}
    settings: Any = {} if routes else {"capabilities": False}
    if below:
        client = OpenAI(**told, http_client=whiflash_sdk.http_client(**settings))
    else:
        client = wrap(OpenAI(**told), **settings)
    with early_tools({"work_out": tool}) as tools:
        stream = client.chat.completions.create(**ASKED)
        text = ""
        for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or ():
                text += (call.function and call.function.arguments) or ""
            if text.endswith("}"):
                tool.ran.wait()  # nobody called it, and the server waits
                held.set()
        assert tools["work_out"](**ARGUMENTS) == "4.00"
    assert (len(tool.threads), tool.early) == (1, 1)


def read(client: OpenAI, **more: Any) -> None:
    list(client.chat.completions.create(**{**ASKED, **more}))


def test_each_call_of_an_answer_has_its_run(client: OpenAI, server: FakeServer, tool: Tool) -> None:
    server.again = 3
    with early_tools({"work_out": tool}) as tools:
        read(wrap(client))
        assert [tools["work_out"](**ARGUMENTS) for _ in range(3)] == ["4.00"] * 3
        assert tool.early == 3
        tools["work_out"](**ARGUMENTS)
    assert (len(tool.threads), tool.early) == (4, 3)


@pytest.mark.parametrize(
    "arguments",
    [{"expression": "2+3"}, {"expression": "2+2", "digits": 1}, {"expression": type("S", (str,), {})("2+2")}],
)
def test_a_call_with_other_arguments_runs_itself(client: OpenAI, tool: Tool, arguments: Any) -> None:
    with early_tools({"work_out": tool}) as tools:
        read(wrap(client))
        tool.ran.wait()
        tools["work_out"](**arguments)
    assert (len(tool.threads), tool.early) == (2, 1)


@pytest.mark.parametrize("arguments", [("2+2",), ("2+2", 2)])
def test_arguments_are_compared_as_the_function_gets_them(client: OpenAI, tool: Tool, arguments: Any) -> None:
    with early_tools({"work_out": tool}) as tools:
        read(wrap(client))
        assert tools["work_out"](*arguments) == "4.00"
    assert (len(tool.threads), tool.early) == (1, 1)


def test_an_exception_reaches_who_calls_and_nobody_else(client: OpenAI, tool: Tool) -> None:
    tool.error = KeyError("no such file")
    with early_tools({"work_out": tool}) as tools:
        read(wrap(client))
        with pytest.raises(KeyError, match="no such file"):
            tools["work_out"](**ARGUMENTS)
        read(client)
    assert tool.early == len(tool.threads)


def test_nothing_runs_that_was_not_called(client: OpenAI, server: FakeServer, tool: Tool) -> None:
    """No tool, another tool, another choice, a whole answer, outside of the block."""
    wrap(client)
    with early_tools({"other": tool}) as others:
        read(client)
        assert others._runs == []
    with early_tools({"work_out": tool}) as tools:
        read(client, tool_choice="none")
        client.chat.completions.create(**{**ASKED, "stream": False})
        assert tools._runs == []
    read(client)
    assert tool.threads == []
    tools["work_out"](**ARGUMENTS)
    assert tool.early == 0


def test_no_outcome_is_older_than_the_newest_request(client: OpenAI, tool: Tool) -> None:
    """The file may have been edited since."""
    with early_tools({"work_out": tool}) as tools:
        read(wrap(client))
        tool.ran.wait()
        client.chat.completions.create(**{**QUESTION, "stream": False})
        tools["work_out"](**ARGUMENTS)
    assert (len(tool.threads), tool.early) == (2, 1)


def test_a_tools_own_requests_begin_no_turn(client: OpenAI, server: FakeServer) -> None:
    """An answer with two calls whose tools ask the model: neither discards the other."""
    server.again = 2
    runs = []
    both = threading.Barrier(2)

    def ask(expression: str) -> str:
        both.wait()
        runs.append(client.chat.completions.create(**{**QUESTION, "stream": False}))
        both.wait()
        return expression

    with early_tools({"work_out": ask}) as tools:
        read(wrap(client))
        assert [tools["work_out"](**ARGUMENTS) for _ in range(2)] == ["2+2", "2+2"]
    assert len(runs) == 2


def test_async_tools_run_in_the_loop_that_reads(
    async_client: AsyncOpenAI, server: FakeServer, held: threading.Event
) -> None:
    runs = []

    async def work_out(expression: str) -> str:
        runs.append(asyncio.current_task())
        held.set()
        await asyncio.sleep(0)
        return expression

    async def main() -> None:
        create = wrap(async_client).chat.completions.create
        with early_tools({"work_out": work_out}) as tools:
            assert inspect.iscoroutinefunction(tools["work_out"])
            async for _ in await create(**ASKED):
                pass
            assert await tools["work_out"](**ARGUMENTS) == "2+2"
            assert len(runs) == 1
            assert runs[0] is not asyncio.current_task()
            async for _ in await create(**ASKED):
                pass
        await asyncio.gather(*(task for task in runs if task), return_exceptions=True)
        await async_client.close()

    asyncio.run(main())


def test_frameworks_see_the_functions_own_face() -> None:
    def look(path: str, deep: bool = False) -> int:
        """Look.

        Args:
            path: where.
        """
        return len(path) if deep else 0

    given = early_tools({"look": look})["look"]
    assert inspect.signature(given) == inspect.signature(look)
    assert (given.__name__, given.__doc__) == ("look", look.__doc__)
    assert "return len(path)" in inspect.getsource(given)


CHAT = [
    {
        "choices": [
            {"index": 0, "delta": {"tool_calls": [{"function": {"name": "f", "arguments": '{"a":1}'}}]}}
        ]
    }
]
MESSAGES = [
    {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "tool_use", "name": "f", "input": {}},
    },
    {
        "type": "content_block_delta",
        "index": 1,
        "delta": {"type": "input_json_delta", "partial_json": '{"a":'},
    },
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": " 1}"}},
]
RESPONSES = [
    {
        "type": "response.output_item.added",
        "output_index": 2,
        "item": {"type": "function_call", "name": "f", "arguments": ""},
    },
    {"type": "response.function_call_arguments.delta", "output_index": 2, "delta": '{"a": 1}'},
]


@pytest.mark.parametrize("events", [CHAT, MESSAGES, RESPONSES], ids=["chat", "messages", "responses"])
def test_every_routes_events_start_a_call(events: list[dict[str, Any]]) -> None:
    ran = threading.Event()
    with early_tools({"f": lambda a: ran.set()}):
        call = Call(None)
        for event in events[:-1]:
            call.take(event)
        assert not ran.is_set()
        call.take(events[-1])
        ran.wait()


def written(*pieces: str) -> list[Any]:
    """What runs early for one call in these pieces."""
    seen = []
    with early_tools({"f": lambda **named: seen.append(named)}) as tools:
        call = Call(None)
        for piece in pieces:
            told = {"index": 0, "function": {"name": "f", "arguments": piece}}
            call.take({"choices": [{"index": 0, "delta": {"tool_calls": [told]}}]})
        tools["f"](mine=True)
    return seen


@pytest.mark.parametrize("text", ['{"a": {"b": 1}', '{"a": "}', '{"a": 1}}', "[1]", '"}"', "{a}", ""])
def test_what_is_no_whole_object_starts_nothing(text: str) -> None:
    assert written(text) == [{"mine": True}]


def test_choices_after_the_first_start_nothing() -> None:
    with early_tools({"f": lambda a: [a]}) as tools:
        for choice, runs in ((1, 0), (0, 1)):
            Call(None).take({"choices": [{**CHAT[0]["choices"][0], "index": choice}]})
            assert len(tools._runs) == runs


def test_a_call_that_goes_on_gives_its_run_to_nobody() -> None:
    with early_tools({"f": lambda a: [a]}) as tools:
        call = Call(None)
        for text in ('{"a": 1}', " ", '{"a": 2}'):
            told = {
                "index": 0,
                "function": {"arguments": text} | ({"name": "f"} if text == '{"a": 1}' else {}),
            }
            call.take({"choices": [{"index": 0, "delta": {"tool_calls": [told]}}]})
        assert tools._take("f", (1,), {}) is None


@pytest.mark.parametrize("function", [max, lambda: 1, lambda a, b: a])
def test_arguments_that_do_not_fit_start_nothing(function: Callable[..., Any]) -> None:
    with early_tools({"f": function}) as tools:
        assert tools.start("f", {"a": 1}) is None


def test_one_block_is_open_once() -> None:
    with early_tools({}) as tools, pytest.raises(RuntimeError, match="one for each conversation"):
        tools.__enter__()

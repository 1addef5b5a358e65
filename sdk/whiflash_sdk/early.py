"""Read-only tools that run while the model still writes: `with early_tools({"search": search}) as tools: …`.

A streamed answer says that a call is complete before it ends: the JSON object of the arguments closes, and other calls,
closing markers and the end of the answer follow.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from typing_extensions import Self

from whiflash_sdk.blocks import BlockValue
from whiflash_sdk.trace import field_of

_MOST_THREADS: Final = 16

Outcome = Future[Any] | asyncio.Task[Any]


@dataclass(eq=False)
class _Run:
    """A function that was started early. arguments: as the function gets them, defaults included."""

    name: str
    arguments: Mapping[str, Any]
    outcome: Outcome

    def drop(self) -> None:
        """Nobody wants the outcome. A thread that runs already goes on to its end."""
        if not isinstance(self.outcome, asyncio.Task):
            self.outcome.cancel()
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its tasks with it
            self.outcome.get_loop().call_soon_threadsafe(_forget, self.outcome)


def _forget(task: asyncio.Task[Any]) -> None:
    task.cancel()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio logs it


class EarlyTools(Mapping[str, Callable[..., Any]]):
    """The functions of `early_tools` by name, to be called as before.

    A function that is called with the arguments of its early run gives that run's result, or raises its exception.
    Otherwise it runs. Names, docstrings and signatures are those of the originals.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._functions = dict(functions)
        self._given = {name: self._giving(name, function) for name, function in functions.items()}
        self._runs: list[_Run] = []
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def __enter__(self) -> Self:
        if self._pool is not None:
            raise RuntimeError("early_tools: this block is open already. Make one for each conversation")
        self._pool = ThreadPoolExecutor(_MOST_THREADS, "whiflash-early-tool")
        _EARLY.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        _EARLY.leave(self)
        pool, self._pool = self._pool, None
        self.drop_all()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def start(self, name: str, arguments: Mapping[str, Any]) -> _Run | None:
        """Start a function, if it is known, takes these arguments and can run from here."""
        function, pool = self._functions[name], self._pool
        bound = _bound(function, (), arguments)
        if bound is None or pool is None:
            return None
        outcome: Outcome
        try:
            if inspect.iscoroutinefunction(function):
                outcome = asyncio.get_running_loop().create_task(_apart_async(function, (), arguments))
            else:
                outcome = pool.submit(contextvars.copy_context().run, _apart, function, (), arguments)
        except RuntimeError:  # no event loop reads the stream, or the block has just ended
            return None
        run = _Run(name, bound, outcome)
        with self._lock:
            self._runs.append(run)
        return run

    def drop(self, run: _Run) -> None:
        """Discard a run unless its outcome was handed over."""
        with self._lock:
            waits = run in self._runs
            if waits:
                self._runs.remove(run)
        if waits:
            run.drop()

    def drop_all(self) -> None:
        """Discard what earlier answers left, so that no outcome is older than the newest request."""
        for run in tuple(self._runs):
            self.drop(run)

    def _take(self, name: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> Outcome | None:
        bound = _bound(self._functions[name], args, named)
        with self._lock:
            for run in self._runs:
                if run.name == name and _same(run.arguments, bound):
                    self._runs.remove(run)
                    return run.outcome
        return None

    def _giving(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def given_async(*args: Any, **named: Any) -> Any:
            outcome = self._take(name, args, named)
            if isinstance(outcome, asyncio.Task) and outcome.get_loop() is asyncio.get_running_loop():
                return await outcome
            return await _apart_async(function, args, named)

        @functools.wraps(function)
        def given(*args: Any, **named: Any) -> Any:
            outcome = self._take(name, args, named)
            return _apart(function, args, named) if outcome is None else outcome.result()

        return given_async if inspect.iscoroutinefunction(function) else given


_EARLY: BlockValue[EarlyTools | None] = BlockValue("whiflash_early_tools", None)


def early_tools(functions: Mapping[str, Callable[..., Any]]) -> EarlyTools:
    """Inside the block, streamed answers start these functions as soon as a call of them is complete.

    `with early_tools({"search": search}) as tools:`, then `tools["search"]` where `search` was called or given to a
    framework. A call is complete when the JSON object of its arguments closes, which is before other calls, closing
    markers and the end of the answer. Nothing runs that the model did not call. A run that nobody asks for is
    discarded: when its call goes on, when the next request begins, when the block ends.

    Only for functions that change nothing and that nobody has to allow first: they run before the framework decides
    whether they may. They run in another thread, `async` ones in a task of the loop that reads the stream. Whole
    answers and choices after the first one start nothing. Have a block for each conversation that runs beside others.

    functions: by the names that the model calls, each with the arguments' names as parameters.
    """
    return EarlyTools(functions)


@dataclass(eq=False)
class _Written:
    """A call, as far as it was streamed."""

    name: str
    text: str = ""
    run: _Run | None = None


class Answer:
    """One streamed answer inside a block."""

    def __init__(self, tools: EarlyTools) -> None:
        self._tools = tools
        self._calls: dict[int, _Written] = {}

    def take(self, event: Any) -> None:
        """Read a chunk or an event, and start the calls that it completes."""
        for index, name, text in _fragments(event):
            call = self._calls.get(index)
            if name and (call is None or call.run is not None):
                call = self._calls[index] = _Written(name)
            if call is None or call.name not in self._tools or not text.strip():
                continue
            call.text += text
            if call.run is not None:
                self._tools.drop(call.run)
            elif (arguments := _object(call.text)) is not None:
                call.run = self._tools.start(call.name, arguments)


def answer_inside() -> Answer | None:
    """A request begins here: what reads its answer for the enclosing block."""
    tools = _EARLY.get()
    if tools is None:
        return None
    tools.drop_all()
    return Answer(tools)


def _fragments(event: Any) -> Iterator[tuple[int, str | None, str]]:
    """Number, name and further arguments of the calls in a chunk of chat, or an event of Messages or Responses."""
    for choice in field_of(event, "choices") or ():
        if field_of(choice, "index"):
            continue
        for place, call in enumerate(field_of(field_of(choice, "delta"), "tool_calls") or ()):
            function, index = field_of(call, "function"), field_of(call, "index")
            yield (
                place if index is None else index,
                field_of(function, "name"),
                field_of(function, "arguments") or "",
            )
    kind, delta = field_of(event, "type"), field_of(event, "delta")
    if kind == "content_block_start":
        block = field_of(event, "content_block")
        if field_of(block, "type") == "tool_use":
            yield field_of(event, "index"), field_of(block, "name"), ""
    elif kind == "content_block_delta" and field_of(delta, "type") == "input_json_delta":
        yield field_of(event, "index"), None, field_of(delta, "partial_json") or ""
    elif kind == "response.output_item.added":
        item = field_of(event, "item")
        if field_of(item, "type") == "function_call":
            yield field_of(event, "output_index"), field_of(item, "name"), field_of(item, "arguments") or ""
    elif kind == "response.function_call_arguments.delta":
        yield field_of(event, "output_index"), None, delta or ""


def _object(text: str) -> dict[str, Any] | None:
    """The arguments, once they are a whole object."""
    if not text.rstrip().endswith("}"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _bound(
    function: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """The arguments by parameter, defaults included; None if the function does not take them."""
    try:
        bound = inspect.signature(function).bind(*args, **named)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return bound.arguments


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal in value and type, unlike `1`, `1.0` and `True`."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, str | int | float) and bool(one == other))


def _apart(function: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Call a tool. Its own requests belong to no block: they begin no turn of the conversation."""
    with _EARLY.holding(None):
        return function(*args, **named)


async def _apart_async(function: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    with _EARLY.holding(None):
        return await function(*args, **named)

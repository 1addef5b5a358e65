"""Flows: code for both blocking and asynchronous clients. A generator yields each step, and one of two drivers runs it.

A step is a result, or an awaitable of one. The driver sends the result into the flow, or throws the step's error.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from inspect import isawaitable
from typing import Any, TypeVar

from anyio.lowlevel import RunVar

ResultT = TypeVar("ResultT")
Flow = Generator[Any, Any, ResultT]


def run(flow: Flow[ResultT]) -> ResultT:
    """Run the flow of a blocking client, whose steps are results and not awaitables; return the flow's result."""
    step = None
    try:
        while True:
            step = flow.send(step)
    except StopIteration as end:
        result: ResultT = end.value
        return result


async def run_async(flow: Flow[ResultT]) -> ResultT:
    """Run a flow, awaiting its steps, and return its result."""
    try:
        step = next(flow)
        while True:
            try:
                brought = await step if isawaitable(step) else step
            except BaseException as error:  # noqa: PERF203 (the flow decides)
                step = flow.throw(error)
            else:
                step = flow.send(brought)
    except StopIteration as end:
        result: ResultT = end.value
        return result


def of_loop(variable: RunVar[ResultT], make: Callable[[], ResultT]) -> ResultT:
    """Return the running event loop's value of a variable, which is made at its first use."""
    try:
        return variable.get()
    except LookupError:
        variable.set(made := make())
        return made

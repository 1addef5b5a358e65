"""One flow for blocking and asynchronous clients: a generator yields each step, and one of two drivers runs it.

A step is yielded as what it brought, or as an awaitable of that. The flow gets the result, or the error that it raised.
"""

from __future__ import annotations

from collections.abc import Generator
from inspect import isawaitable
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")
Flow = Generator[Any, Any, ResultT]


def run(flow: Flow[ResultT]) -> ResultT:
    """Result of the flow. Its steps are done when they are yielded."""
    step = None
    try:
        while True:
            step = flow.send(step)
    except StopIteration as end:
        result: ResultT = end.value
        return result


async def run_async(flow: Flow[ResultT]) -> ResultT:
    """Result of the flow. Its steps are awaited."""
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

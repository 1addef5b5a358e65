"""Traces of everything asked inside a block, for frameworks that keep the responses to themselves.

`with collect() as collected: agent.run(…)`, then `collected.traces`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from openai import AsyncStream, Stream

from whiflash_sdk.streaming import AsyncTracedStream, TracedStream
from whiflash_sdk.trace import Trace, parse_trace, raw_traces


class Collected:
    """The traces of the calls that wrapped clients made inside one `collect` block."""

    def __init__(self) -> None:
        self._raw: list[Any] = []

    def add(self, raw: list[Any]) -> None:
        """Keep the traces of one response, as the server sent them."""
        self._raw.extend(raw)

    @property
    def traces(self) -> list[Trace]:
        """One trace a choice, in the order the responses ended. Raises: TraceError for a broken one."""
        return [parse_trace(raw) for raw in self._raw]


_COLLECTING: ContextVar[tuple[Collected, ...]] = ContextVar("whiflash_collecting", default=())


@contextmanager
def collect() -> Iterator[Collected]:
    """Collect the traces of every call made inside, in this thread or task and those it starts."""
    collected = Collected()
    token = _COLLECTING.set((*_COLLECTING.get(), collected))
    try:
        yield collected
    finally:
        _COLLECTING.reset(token)


def note(result: Any) -> None:
    """Hand the trace of a client's result to the enclosing blocks; a stream's when it ends."""
    collectors = _COLLECTING.get()
    if not collectors:
        return
    if isinstance(result, Stream):
        result._iterator = _noting(result._iterator, collectors)
    elif isinstance(result, AsyncStream):
        result._iterator = _anoting(result._iterator, collectors)
    elif hasattr(result, "http_response"):  # a raw response: its body is there unless it is a stream
        if result.http_response.is_stream_consumed and _is_json(result):
            _add(collectors, raw_traces(result.http_response.json()))
    else:
        _add(collectors, raw_traces(result))


def _is_json(raw: Any) -> bool:
    return "application/json" in raw.http_response.headers.get("content-type", "")


def _add(collectors: tuple[Collected, ...], raw: list[Any]) -> None:
    for collected in collectors:
        collected.add(raw)


def _noting(items: Iterator[Any], collectors: tuple[Collected, ...]) -> Iterator[Any]:
    stream = TracedStream(items)
    try:
        yield from stream
    finally:
        _add(collectors, stream.raw_traces)


async def _anoting(items: AsyncIterator[Any], collectors: tuple[Collected, ...]) -> AsyncIterator[Any]:
    stream = AsyncTracedStream(items)
    try:
        async for item in stream:
            yield item
    finally:
        _add(collectors, stream.raw_traces)

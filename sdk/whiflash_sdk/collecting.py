"""Traces of everything asked inside a block, for frameworks that keep the responses to themselves.

`with collect() as collected: agent.run(…)`, then `collected.traces`; `collect(client)` for a client that other threads
use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream

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
        return [parse_trace(raw) for raw in list(self._raw)]


_COLLECTING: ContextVar[tuple[Collected, ...]] = ContextVar("whiflash_collecting", default=())


_SCOPES: Final = "_whiflash_scopes"


@contextmanager
def collect(*clients: OpenAI | AsyncOpenAI) -> Iterator[Collected]:
    """Collect the traces of the calls made until the block ends; a stream's when it is read to its end.

    Without clients: the calls of every wrapped client in this thread or task, in tasks started inside and in
    `asyncio.to_thread`. Threads that one starts oneself, and pools of them, do not know of the block (they do where
    Python is told to, by `-X thread_inherit_context` from 3.14 on, and where one gives them `copy_context().run`).

    With clients: every call of these, and of clients made from them, in whatever thread or task, and no others. For
    blocks at the same time that are not to mix, give each a client of its own: `client.with_options()`.

    Raises: TypeError for a client that is not wrapped.
    """
    collected = Collected()
    if not clients:
        token = _COLLECTING.set((*_COLLECTING.get(), collected))
        try:
            yield collected
        finally:
            _COLLECTING.reset(token)
        return
    scopes = [_scope(client) for client in clients]
    for scope in scopes:
        scope.append(collected)
    try:
        yield collected
    finally:
        for scope in scopes:
            scope.remove(collected)


def open_scope(client: OpenAI | AsyncOpenAI, origin: OpenAI | AsyncOpenAI | None = None) -> None:
    """Let `collect(client)` see this client's calls, and blocks on the client that it was made from see them too."""
    outer = vars(origin)[_SCOPES] if origin is not None else ()
    vars(client)[_SCOPES] = (*outer, [])


def _scope(client: OpenAI | AsyncOpenAI) -> list[Collected]:
    try:
        scopes: tuple[list[Collected], ...] = vars(client)[_SCOPES]
    except (TypeError, KeyError):
        raise TypeError("collect takes clients that were wrapped: whiflash_sdk.wrap(client) first") from None
    return scopes[-1]


def collectors(client: Any) -> tuple[Collected, ...]:
    """The blocks that a call of this client, made now and here, belongs to."""
    by_client = (collected for scope in vars(client)[_SCOPES] for collected in scope)
    return tuple(dict.fromkeys((*_COLLECTING.get(), *by_client)))


def note(result: Any, collectors: tuple[Collected, ...]) -> None:
    """Hand the trace of a client's result to the blocks that its call belongs to; streams do so when they end."""
    if not collectors or isinstance(result, Stream | AsyncStream):
        return
    if hasattr(result, "http_response"):  # a raw response: its body is there unless it is a stream
        if result.http_response.is_stream_consumed and _is_json(result):
            _add(collectors, raw_traces(result.http_response.json()))
    else:
        _add(collectors, raw_traces(result))


def _is_json(raw: Any) -> bool:
    return "application/json" in raw.http_response.headers.get("content-type", "")


def _add(collectors: tuple[Collected, ...], raw: list[Any]) -> None:
    for collected in collectors:
        collected.add(raw)

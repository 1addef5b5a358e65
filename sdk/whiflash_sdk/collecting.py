"""Traces of everything asked inside a block, for frameworks that keep the responses to themselves.

`with collect() as collected: agent.run(…)`, then `collected.traces`; `collect(client)` for a client that other threads
use.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream

from whiflash_sdk.blocks import BlockValue
from whiflash_sdk.report import Report
from whiflash_sdk.trace import CollectedTrace, parse_trace, raw_traces, tools_called


@dataclass(eq=False)
class Call:
    """One call of a wrapped client. began: by a clock that never jumps. raw: its traces as the server sent them."""

    agent: str | None
    started: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    began: float = field(default_factory=time.monotonic)
    ended: datetime | None = None
    response_id: str | None = None
    model: str | None = None
    raw: list[Any] = field(default_factory=list)
    tools: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def end(self, raw: list[Any], response: Any, tools: dict[int, tuple[str, ...]]) -> None:
        """Take the traces, the response or one of its chunks, which names the response and its model, and the tools
        that each choice calls.
        """
        # The wall clock may jump in between.
        self.ended = self.started + timedelta(seconds=time.monotonic() - self.began)
        self.raw, self.tools = raw, tools
        self.response_id, self.model = (_text(response, name) for name in ("id", "model"))

    def traces(self) -> Iterator[CollectedTrace]:
        """One a choice. Raises: TraceError for a broken one."""
        names = ("response_id", "model", "agent", "started", "ended")
        known = {name: getattr(self, name) for name in names}
        for raw in self.raw:
            trace = parse_trace(raw)
            tools = self.tools.get(trace.choice, ())
            yield CollectedTrace.model_construct(**dict(trace), **known, tools=tools)


class Collected:
    """The traces of the calls that wrapped clients made inside one `collect` block."""

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def add(self, call: Call) -> None:
        """Keep a call that starts."""
        self._calls.append(call)

    @property
    def traces(self) -> list[CollectedTrace]:
        """One trace a choice of every call that has ended, in the order the calls started.

        Raises: TraceError for a broken one.
        """
        return [trace for call in list(self._calls) for trace in call.traces()]

    def report(self) -> Report:
        """What the calls that have ended came to: by agent, tool, turn and drafter.

        Raises: TraceError for a broken trace.
        """
        return Report.of(self.traces)


_COLLECTING: BlockValue[tuple[Collected, ...]] = BlockValue("whiflash_collecting", ())
_SCOPES: Final = "_whiflash_scopes"
_CALL: Final = "whiflash_call"


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
        with _COLLECTING.holding((*_COLLECTING.get(), collected)):
            yield collected
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


def start(client: Any, agent: str | None) -> Call:
    """A call of this client, made now and here, in every block that it belongs to."""
    call = Call(agent)
    by_client = (collected for scope in vars(client)[_SCOPES] for collected in scope)
    for collected in dict.fromkeys((*_COLLECTING.get(), *by_client)):
        collected.add(call)
    return call


def note(result: Any, call: Call) -> None:
    """Take the trace of a client's result; a stream hands over its own when it ends (`call_of`)."""
    if isinstance(result, Stream | AsyncStream):
        result.response.extensions[_CALL] = call
    elif not hasattr(result, "http_response"):
        call.end(raw_traces(result), result, tools_called(result))
    elif result.http_response.is_stream_consumed and _is_json(result):  # a raw response
        body = result.http_response.json()
        call.end(raw_traces(body), body, tools_called(body))
    else:
        result.http_response.extensions[_CALL] = call


def call_of(response: Any) -> Call | None:
    """The call that an HTTP response answers, if `note` saw its stream or raw response."""
    call: Call | None = response.extensions.get(_CALL)
    return call


def _is_json(raw: Any) -> bool:
    return "application/json" in raw.http_response.headers.get("content-type", "")


def _text(response: Any, name: str) -> str | None:
    found = response.get(name) if isinstance(response, Mapping) else getattr(response, name, None)
    return found if isinstance(found, str) else None

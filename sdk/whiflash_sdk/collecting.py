"""Collects the traces of all calls inside a block, for frameworks that do not return the responses.

`with collect() as collected: agent.run(…)`, then `collected.traces`; `collect(client)` for a client that other threads
use.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from whiflash_sdk import trace
from whiflash_sdk.blocks import BlockValue
from whiflash_sdk.errors import TraceError
from whiflash_sdk.otel import add_to, current_span
from whiflash_sdk.previews import Turn
from whiflash_sdk.reading import text_or_none
from whiflash_sdk.report import Report, Share
from whiflash_sdk.trace import CollectedTrace


@dataclass(eq=False)
class CollectedCall:
    """One call of a wrapped client.

    began: in monotonic seconds. span: OpenTelemetry's, if one records. turn: the session's turn to which the answer is
    passed on, if the server prefills previews of the next prompt.
    """

    agent: str | None
    started: datetime = field(default_factory=lambda: datetime.now(timezone.utc))  # noqa: TID251 (a date)
    began: float = field(default_factory=time.monotonic)
    ended: datetime | None = None
    response_id: str | None = None
    model: str | None = None
    tools: dict[int, tuple[str, ...]] = field(default_factory=dict)
    span: Any = field(default_factory=current_span)
    turn: Turn | None = None
    _sent: dict[int, Any] = field(default_factory=dict)
    _texts: dict[int | None, list[str]] = field(default_factory=dict)

    def take(self, body: Any) -> bool:
        """Store the traces of an answer, or of its chunk or event, as JSON or an object. True if it has any."""
        if self.response_id is None:
            answer = trace.answer_in(body)
            self.response_id, self.model = (text_or_none(trace.field_of(answer, name)) for name in ("id", "model"))
        for choice, text in trace.texts_of(body).items():
            self._texts.setdefault(choice, []).append(text)
        for choice, names in trace.tools_called(body).items():
            self.tools[choice] = (*self.tools.get(choice, ()), *names)
        traces = trace.sent_traces(body)
        for raw in traces:
            self._sent[raw.get("choice", 0) if isinstance(raw, dict) else 0] = raw
        if self.turn is not None:
            self.turn.take(body)
        return bool(traces)

    def end(self) -> None:
        """End the call: the answer is complete, or nobody reads on. Adds the figures to the OpenTelemetry span."""
        if self.ended is not None:
            return
        # The end is not read from the wall clock, which may jump during the call.
        self.ended = self.started + timedelta(seconds=time.monotonic() - self.began)
        self.turn = None  # it holds the conversation, and somebody may keep the call
        if self.span is not None and self._sent:
            with contextlib.suppress(TraceError):  # `traces` raises it
                share = Share.of("", list(self.traces()))
                add_to(self.span, share, (self.response_id, self.model, self.agent))

    @property
    def raw_traces(self) -> list[Any]:
        """Return the traces received so far, one for each choice, as the server sent them."""
        texts = {choice: "".join(parts) for choice, parts in self._texts.items()}
        return [trace.with_text(raw, texts) for raw in self._sent.values()]

    def traces(self) -> Iterator[CollectedTrace]:
        """Yield a trace for each choice, once the answer has ended. Raises: TraceError for a malformed one."""
        names = ("response_id", "model", "agent", "started", "ended")
        fields = {name: getattr(self, name) for name in names}
        for raw in self.raw_traces if self.ended else ():
            parsed = trace.parse_trace(raw)
            tools = self.tools.get(parsed.choice, ())
            yield CollectedTrace.model_construct(**dict(parsed), **fields, tools=tools)


class Collected:
    """The traces of the calls that wrapped clients made inside one `collect` block."""

    def __init__(self) -> None:
        self._calls: list[CollectedCall] = []

    def add(self, call: CollectedCall) -> None:
        """Add a call that starts."""
        self._calls.append(call)

    @property
    def traces(self) -> list[CollectedTrace]:
        """Return a trace for each choice of every call that has ended, in the order in which the calls started.

        Raises: TraceError for a malformed one.
        """
        return [found for call in list(self._calls) for found in call.traces()]

    def report(self) -> Report:
        """Report the calls that have ended: by agent, tool, turn and drafter.

        Raises: TraceError for a malformed trace.
        """
        return Report.of(self.traces)


_COLLECTING: BlockValue[tuple[Collected, ...]] = BlockValue("whiflash_collecting", ())
_SCOPES: Final = "_whiflash_scopes"


@contextmanager
def collect(*clients: Any) -> Iterator[Collected]:
    """Collect the traces of the calls made in the block. A stream's trace is there once it was read to its end.

    Without clients: the calls of every wrapped client in this thread or task, in tasks started inside and in
    `asyncio.to_thread`. Other threads and pools do not inherit the block, except with Python's
    `-X thread_inherit_context` (from 3.14 on), or if you run `copy_context().run` in them.

    With clients, wrapped ones or those of `http_client`: the calls of these, and of clients made from them, in any
    thread or task, and no others. To keep two concurrent blocks apart, give each a client of its own:
    `client.with_options()`.

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


def open_scope(client: Any, origin: Any = None) -> None:
    """Let `collect(client)` record this client's calls, and `collect(origin)`, too, if it was made from `origin`."""
    outer = vars(origin)[_SCOPES] if origin is not None else ()
    vars(client)[_SCOPES] = (*outer, [])


def _scope(client: Any) -> list[Collected]:
    try:
        scopes: tuple[list[Collected], ...] = vars(client)[_SCOPES]
    except (TypeError, KeyError):
        raise TypeError("collect takes clients that were wrapped: whiflash_sdk.wrap(client) first") from None
    return scopes[-1]


def start(client: Any, agent: str | None) -> CollectedCall:
    """Start a call of this client, and add it to every `collect` block that it belongs to."""
    call = CollectedCall(agent)
    by_client = (collected for scope in vars(client)[_SCOPES] for collected in tuple(scope))
    for collected in dict.fromkeys((*_COLLECTING.get(), *by_client)):
        collected.add(call)
    return call

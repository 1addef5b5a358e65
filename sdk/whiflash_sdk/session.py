"""One tenant's conversation with one agent: `with Session(tenant="acme", agent="coder"): agent.run(...)`."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from typing_extensions import Self

from whiflash_sdk.blocks import BlockValue
from whiflash_sdk.capabilities import close_session
from whiflash_sdk.edits import file_to_edit
from whiflash_sdk.flow import Flow, run, run_async
from whiflash_sdk.hints import Hints, name_sent
from whiflash_sdk.identity import Asker
from whiflash_sdk.previews import StreamedResult, Turn
from whiflash_sdk.trace import field_of

_LOG: Final = logging.getLogger("whiflash_sdk")


@dataclass(frozen=True)
class Session:
    """Names the tenant and the agent of the calls inside the block, in this thread or task.

    An inner session inherits fields that it leaves out. If a request offers a tool that edits files, the file that the
    conversation read or wrote last is sent as its prediction. A call, an inner block or `predict` wins.

    A server with `--enable-session-radix-cache` evicts the session's prompts after those of requests without a session,
    until the block ends. A session that names an agent is one conversation: each call continues the one before, and
    what a call does not continue is evicted first. Give a subagent, or calls beside the conversation, an inner
    `Session` with an agent of its own. `async with` waits until an asynchronous client has closed it.

    tenant: owner of the answers' text, as in `wrap(tenant=)`. agent: name of the agent. predicts: whether files are
    predicted; the default is yes. task: name of the task, whose calls copy from each other's answers. preview: whether
    the server prefills the next prompt while a tool runs; the default is no, and it needs `agent`.

    Raises: ValueError for an empty tenant.
    """

    tenant: str | None = None
    agent: str | None = None
    predicts: bool | None = None
    task: str | None = None
    preview: bool | None = None
    id: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tenant == "":
            raise ValueError("tenant: is empty, which is no salt. Give a name, or None")
        object.__setattr__(self, "id", f"{'line' if self.agent else 'calls'}:{uuid.uuid4().hex}")

    def __enter__(self) -> Self:
        _SESSION.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        _SESSION.leave(self)
        _ended(self.id)
        for place in _taken(self.id):
            place.close()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        _SESSION.leave(self)
        _ended(self.id)
        with anyio.CancelScope(shield=True):  # a cancelled block closes, too; `close_session` bounds the seconds
            for place in _taken(self.id):
                await run_async(place.closing())

    def stream_result(self, call: str | None = None) -> StreamedResult:
        """Return a writer for a tool's result, which is previewed as it comes. call: id of the tool call; None is the
        first one of the last answer without a result. Without `preview`, or on another server, it only keeps the text.
        """
        return StreamedResult(_turns.get(self.id), call)

    def sent_to(self, asker: Asker, sent: str, body: Mapping[str, Any], *, is_async: bool) -> None:
        """Note that a request with this id goes to the asker's server, where it is to be closed."""
        tenant = tuple((name, key) for name in ("cache_salt", "extra_key") if isinstance(key := body.get(name), str))
        key = (asker.base, asker.fingerprint(asker.base), is_async, sent, tenant)
        # In one step after the digest: another thread may end the session meanwhile.
        _open.setdefault((os.getpid(), self.id), {}).setdefault(key, _Place(asker, sent, tenant, is_async))

    def hints(self) -> Hints:
        """Return hints with the names of agent and task, as far as they are given."""
        agent = Hints(agent=name_sent(self.agent)) if self.agent else Hints()
        return Hints(task=name_sent(self.task)).over(agent) if self.task else agent

    def prediction(self, body: Mapping[str, Any], parser: str | None) -> str | None:
        """Return the file that this request may edit; None if unknown. parser: the server's parser of tool calls."""
        return None if self.predicts is False else file_to_edit(body, parser)


@dataclass(frozen=True)
class _Place:
    """A session that is open on one server. tenant: fields of its requests that name the tenant."""

    asker: Asker
    session: str
    tenant: tuple[tuple[str, str], ...]
    is_async: bool

    def close(self) -> None:
        """Close the session; a task of the running event loop does it if the client is asynchronous."""
        if not self.is_async:
            run(self.closing())
            return
        try:
            task = asyncio.get_running_loop().create_task(_finish(self))
        except RuntimeError:  # no loop of asyncio runs here
            try:
                anyio.run(run_async, self.closing())
            except RuntimeError as error:  # one of another library does
                _failed(self.asker, error)
        else:
            _tasks.add(task)
            task.add_done_callback(_tasks.discard)

    def closing(self) -> Flow[None]:
        """Close the session. Errors are logged, not raised: the only harm is that these prompts are evicted late."""
        try:
            yield from close_session(self.asker, {"session_id": self.session, **dict(self.tenant)})
        except Exception as error:
            _failed(self.asker, error)


async def _finish(place: _Place) -> None:
    """Close a session on its server, again if this task is cancelled. A loop that ends cancels its tasks once, then
    waits for them.
    """
    try:
        await run_async(place.closing())
    except asyncio.CancelledError:
        await run_async(place.closing())


_open: dict[tuple[int, str], dict[object, _Place]] = {}
"""Servers with open sessions, by process and session: a fork does not close those of its parent."""
_turns: dict[str, Turn] = {}
"""The newest turn of each open session that has previews."""
_tasks: set[asyncio.Task[None]] = set()
_unclosed: set[str] = set()
"""Servers that did not close a session, each of which is logged once."""


def _ended(session: str) -> None:
    if (turn := _turns.pop(session, None)) is not None:
        turn.end()


def _taken(session: str) -> Iterator[_Place]:
    return iter([*_open.pop((os.getpid(), session), {}).values()])


def _failed(asker: Asker, error: Exception) -> None:
    server = asker.base.rpartition("@")[2]
    if server not in _unclosed:
        _unclosed.add(server)
        _LOG.warning(
            "%s did not close a session (%s): its prompts are evicted later than they could be. Let proxies pass "
            "POST /close_session, and close clients after their sessions",
            server,
            type(error).__name__,
        )


@atexit.register
def _close_all() -> None:
    for process, session in list(_open):
        for place in _taken(session) if process == os.getpid() else ():
            place.close()


_SESSION: BlockValue[Session | None] = BlockValue("whiflash_session", None)


def session() -> Session | None:
    """Merge the enclosing sessions field by field, the innermost first; None outside of sessions."""
    held = [one for one in _SESSION.held() if one]

    def field(name: str) -> Any:
        return next((value for one in held if (value := getattr(one, name)) is not None), None)

    names = ("tenant", "agent", "predicts", "task", "preview")
    return Session(*map(field, names)) if held else None


def conversation() -> Session | None:
    """Return the session whose id is sent: the innermost that names an agent, or the outermost; None outside of
    sessions."""
    held = [one for one in _SESSION.held() if one]
    return next((one for one in held if one.agent), held[-1]) if held else None


def naming_sessions() -> list[Session]:
    """Return the enclosing sessions that name an agent or a task, the innermost first."""
    return [one for one in _SESSION.held() if one and (one.agent or one.task)]


def turn_of(asker: Asker, body: Mapping[str, Any], *, is_async: bool) -> Turn | None:
    """Begin the `Turn` of a chat completion; None unless its session sends previews. body: as it is sent."""
    talk, inside = conversation(), session()
    if talk is None or inside is None or not (inside.preview and talk.agent) or body.get("session_id") != talk.id:
        return None
    _ended(talk.id)
    messages = body.get("messages")
    if body.get("n") not in (None, 1) or body.get("continue_final_message") or not isinstance(messages, list):
        return None
    contents = [content for one in messages if isinstance(content := field_of(one, "content"), list)]
    if any(field_of(part, "type") != "text" for content in contents for part in content):
        return None  # the server refuses previews with images
    turn = _turns[talk.id] = Turn(asker, body, is_async=is_async)
    return turn

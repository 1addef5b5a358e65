"""Capabilities of a server, by `GET /whiflash/capabilities`: asked for every base URL and key, now and again.

An answer holds for five minutes. The status 404 also is an answer: the server does not route. After any other failure
(busy, wrong key, unreachable, a page instead of the document) the SDK asks again, after a second at first and after a
minute at last. Meanwhile a server that was known to route stays known.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit
from weakref import WeakKeyDictionary

import anyio
from anyio.lowlevel import RunVar
from pydantic import BaseModel, ConfigDict, ValidationError

from whiflash_sdk.errors import UnsupportedServerError, warn_unsupported
from whiflash_sdk.flow import Flow, of_loop, run, run_async
from whiflash_sdk.identity import Asker, OfClient
from whiflash_sdk.otel import untraced

if TYPE_CHECKING:  # takes longer to import than all of this package
    from openai import AsyncOpenAI, NotGiven, OpenAI, Timeout

PROBE_SECONDS: Final = 2.0
KEPT_SECONDS: Final = 300.0
FIRST_RETRY_SECONDS: Final = 1.0
LONGEST_RETRY_SECONDS: Final = 60.0
MOST_SERVERS: Final = 8192
MOST_WARNINGS: Final = 256
_SHOWN: Final = 128
"""Characters of a request's model in a warning."""
PREDICTION_TOKENS: Final = 16384
"""Limit of a server whose bundle does not set `prediction_tokens` of `lookup`."""

ROUTES: Final = ("chat/completions", "completions", "responses", "messages")
"""Routes of a server of this release whose target's conversations can be converted."""

_LOG: Final = logging.getLogger("whiflash_sdk")

now = time.monotonic


class Capabilities(BaseModel):
    """A WhiFlash server's description of itself (`docs/reference/hints.md`); unknown fields are ignored.

    version: of the protocol, 1.
    server_version: of `whiflash-sglang`.
    model: its served name.
    policy: the routing policy in force.
    arms: loaded drafters, and `none`.
    routes: routes below `/v1` that read hints.
    prediction_tokens: most tokens of a prediction; the rest is cut. 0: predictions are ignored.
    tool_call_parser, reasoning_parser: SGLang's parser in force, if any.
    tenant_header: whether a gateway's header `X-WhiFlash-Tenant` names the tenant, whatever requests say.
    sessions: whether it keeps the prompts of open sessions longest (`--enable-session-radix-cache`).
    previews: whether it prefills a session's next prompt ahead (`preview` of hints).
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    version: int
    server_version: str = ""
    model: str = ""
    policy: str = ""
    arms: tuple[str, ...] = ()
    routes: tuple[str, ...] = ("chat/completions", "completions")
    prediction_tokens: int = 0
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    tenant_header: bool = False
    sessions: bool = False
    previews: bool = False

    def assumed(self) -> Capabilities:
        """Complete capabilities that a caller wrote: fields that are not set get the values of a server of this
        release."""
        latest = {"routes": ROUTES, "prediction_tokens": PREDICTION_TOKENS, "sessions": True, "previews": True}
        return self.model_copy(update={k: v for k, v in latest.items() if k not in self.model_fields_set})


@dataclass(eq=False)
class AskedServer:
    """State of the server at one base URL, as one key sees it.

    One caller asks the server; callers that come meanwhile wait for its answer, or use the one that is being renewed.
    Threads wait at one lock and the tasks of an event loop at another, because a thread that waits for a task of
    its own loop would wait for ever.

    url: the route that is asked, without a password. found: the server's capabilities. alone: whether `/v1/models`
    lists their model and no other; None: not asked. was_alone: its value before. trouble: why `found` is None.
    failures: of the route, in a row; lists: failures of `/v1/models`, in a row. next_probe: earliest time of the next
    question, by `now`.
    """

    url: str
    found: Capabilities | None = None
    alone: bool | None = None
    was_alone: bool = False
    trouble: str = "has not been asked"
    failures: int = 0
    lists: int = 0
    next_probe: float = -inf
    threads: Lock = field(default_factory=Lock)

    def is_due(self, model: str | None) -> bool:
        """Whether the server must be asked again before a request for this model; None: for any model."""
        return now() >= self.next_probe or self.needs_list(model)

    def is_known(self, model: str | None) -> bool:
        """Whether a request for this model need not wait while another caller asks the server."""
        return self.found is not None and not self.needs_list(model)

    def needs_list(self, model: str | None) -> bool:
        """Whether `/v1/models` must be read to know if requests for `model` reach the server that answered.

        SGLang answers to any name. A gateway with several models sends other names to other servers, which may refuse
        fields that they do not know, and need not read what an agent says about its work.
        """
        found = self.found  # another thread may forget it meanwhile
        return found is not None and self.alone is None and not _names(found, model)

    def listed(self, models: object) -> None:
        """Note from the answer of `/v1/models` whether it lists only the found model and its adapters (`alone`)."""
        entries = models.get("data") if isinstance(models, dict) else None
        name = None if (found := self.found) is None else found.model
        others = [entry for entry in entries or () if isinstance(entry, dict) and entry.get("parent") != name]
        self.alone = {entry.get("id") for entry in others} == {name}
        self.lists = 0 if entries else self.lists

    def unlisted(self) -> None:
        """Note that `/v1/models` failed: keep the last list, and ask again after a time that doubles."""
        self.alone = self.was_alone
        self.next_probe = now() + _wait(self.lists)
        self.lists += 1

    def answered(self, body: object) -> None:
        """Read the capabilities in `body`, of an answer with status 200, and plan the next question."""
        known, self.found = self.found, _read(body)
        last = self.was_alone if self.alone is None else self.alone
        self.was_alone = last and known is not None and self.found == known
        self.alone = None
        if self.found is None:
            self._note("answered with something else than this SDK reads", self.failures + 1)
        else:
            self._note(f"routes: {self.found!r}")

    def failed(self, error: Exception) -> None:
        """Note a question's error, and when to ask again. Only its type is stored: its message may quote a key."""
        status = _status(error)
        kinds = {kind.__name__ for kind in type(error).__mro__}  # by name, for four libraries
        if status == 404:
            self.found = None
            self._note("answered 404")
        elif status is not None:
            self._note(f"answered {status}", self.failures + 1)
        elif kinds & {"APITimeoutError", "TimeoutException", "TimeoutError"}:
            self._note("gave no answer in time", self.failures + 1)
        elif kinds & {"APIConnectionError", "TransportError"}:
            self._note("could not be reached", self.failures + 1)
        else:
            self._note(f"could not be asked ({type(error).__name__})", self.failures + 1)

    def refused(self, name: str) -> None:
        """Note that a request was refused for our field `name` and served without it, so another server answers now."""
        self.found = None
        self._note(f"answered, but {name} was refused")

    def require(self, model: str | None, *, strict: bool) -> Capabilities | None:
        """Return the capabilities if they are for this model; else warn once per URL and trouble and return None.

        Raises: UnsupportedServerError under `strict`, in place of the warning.
        """
        trouble, found = self.trouble, self.found
        if found is not None:
            if self.alone or _names(found, model):
                return found
            named = model if model is None else model[:_SHOWN]
            trouble = f"answers for the model {found.model!r}, and this request is for {named!r}"
        wait = max(0.0, self.next_probe - now())
        reason = f"{self.url} {trouble}; asked again in {wait:.0f} s"
        if strict:
            raise UnsupportedServerError(
                f"{reason}. Start the server with `whiflash serve`, wrap with strict=False, or say what it can "
                "do with wrap(client, capabilities=…)"
            )
        warning = (self.url, trouble)
        # An unreachable server needs no warning, since the request fails, too. The number of warnings is bounded,
        # because they hold the request's model, which is anybody's text.
        if trouble != "could not be reached" and warning not in _warned and len(_warned) < MOST_WARNINGS:
            _warned.add(warning)
            warn_unsupported(f"{reason}. Requests go out without hints")
        return None

    def _note(self, trouble: str, failures: int = 0) -> None:
        """Store how the question ended, and set when to ask next, which is sooner after `failures` in a row."""
        seconds = _wait(failures - 1) if failures else KEPT_SECONDS
        self.trouble, self.failures, self.next_probe = trouble, failures, now() + seconds
        _LOG.debug("%s %s; asked again in %g s", self.url, trouble, seconds)


def _wait(failures: int) -> float:
    """Return the seconds to wait before asking again. failures: number of failures in a row before this one."""
    return float(min(FIRST_RETRY_SECONDS * 2 ** min(failures, 16), LONGEST_RETRY_SECONDS))


def _status(error: Exception) -> Any:
    return getattr(getattr(error, "response", None), "status_code", None)


# Known servers, the oldest first; locks for the tasks of one event loop; URLs and troubles that were warned about.
_servers: dict[tuple[int, bytes], AskedServer] = {}
_LOCKS: RunVar[WeakKeyDictionary[AskedServer, anyio.Lock]] = RunVar("whiflash_locks")
_warned: set[tuple[str, str]] = set()


def capabilities(client: OpenAI) -> Capabilities | None:
    """Return the server's capabilities; None if it does not route or could not be asked.

    It takes at most the client's own timeout, and never more than two seconds a phase (connect, read).
    """
    return ask(OfClient(client)).found


async def async_capabilities(client: AsyncOpenAI) -> Capabilities | None:
    """Return the server's capabilities, for an async client (see `capabilities`); takes at most two seconds in all."""
    return (await async_ask(OfClient(client))).found


def ask(asker: Asker, timeout: float | Timeout | NotGiven | None = None, model: str | None = None) -> AskedServer:
    """Return what is known about the asker's server, after asking it if that is due.

    timeout: of the request that needs the answer, which bounds the question; if not given, the asker's. model: that
    the request names.
    """
    url, server = _server(asker)
    if server.is_due(model):
        limits = _limits(asker, timeout)
        if server.threads.acquire(timeout=0 if server.is_known(model) else _longest(limits)):
            try:
                run(_probe(asker, url, server, limits, model))
            finally:
                server.threads.release()
    return server


async def async_ask(
    asker: Asker, timeout: float | Timeout | NotGiven | None = None, model: str | None = None
) -> AskedServer:
    """Return what is known about the asker's server, for an asynchronous asker (see `ask`)."""
    url, server = _server(asker)
    lock = of_loop(_LOCKS, WeakKeyDictionary).setdefault(server, anyio.Lock())
    if server.is_due(model) and not (lock.locked() and server.is_known(model)):
        limits = _limits(asker, timeout)
        is_asking = False
        with anyio.move_on_after(_longest(limits)) as scope:
            async with lock:
                is_asking = True
                await run_async(_probe(asker, url, server, limits, model))
                is_asking = False
        if is_asking and scope.cancel_called:
            if server.is_due(None):
                server.failed(TimeoutError())
            else:  # the route answered, and the list is missing
                server.unlisted()
    return server


def _probe(asker: Asker, url: str, server: AskedServer, limits: dict[str, float], model: str | None) -> Flow[None]:
    """Ask for the capabilities if they are due, and for the list of models if it decides about this model."""
    with untraced():
        if server.is_due(None):
            try:
                server.answered((yield from asker.ask(url, limits)))
            except Exception as error:  # hooks and key providers are the user's; a probe breaks no request
                server.failed(error)
        if server.needs_list(model):
            try:
                server.listed((yield from asker.ask(f"{asker.base}/models", limits)))
            except Exception as error:
                if _status(error) == 404:
                    server.listed(None)
                else:
                    server.unlisted()


def _server(asker: Asker) -> tuple[str, AskedServer]:
    """Return the URL to ask, and the state of that server for the asker's key in this process."""
    url, shown = _addresses(asker, "/whiflash/capabilities")
    # The process id is part of the key: in a fork nobody would release locks that its parent's threads hold.
    server = _servers.setdefault((os.getpid(), asker.fingerprint(url)), AskedServer(shown))
    for oldest in list(_servers)[:-MOST_SERVERS] if len(_servers) > MOST_SERVERS else ():
        _servers.pop(oldest, None)
    return url, server


def close_session(asker: Asker, body: Mapping[str, str]) -> Flow[None]:
    """Close a session on its server; connecting, writing and reading take at most two seconds each.

    Raises: the client's errors.
    """
    with untraced():
        yield from asker.ask(_addresses(asker, "/close_session")[0], _limits(asker, None), body)


def _addresses(asker: Asker, route: str) -> list[str]:
    """Return the URL of a route at the server's root, and the same without a password."""
    base = urlsplit(asker.base)
    # The server's root is the base URL without its API version: `/v1` is where OpenAI's routes live.
    path = base.path.rstrip("/").removesuffix("/v1") + route
    places = (base.netloc, base.netloc.rpartition("@")[2])
    return [urlunsplit((base.scheme, netloc, path, "", "")) for netloc in places]


def _limits(asker: Asker, timeout: float | Timeout | NotGiven | None) -> dict[str, float]:
    """Return seconds by phase, at most `PROBE_SECONDS`, from any timeout that HTTPX or HTTPX 2 takes."""
    asked: Any = asker.timeout if timeout is None or type(timeout).__name__ == "NotGiven" else timeout
    if hasattr(asked, "as_dict"):
        asked = asked.as_dict()
    elif not isinstance(asked, dict):
        given = (*asked, None, None)[:4] if isinstance(asked, tuple) else (asked,) * 4
        asked = dict(zip(("connect", "read", "write", "pool"), given, strict=True))
    return {name: min(PROBE_SECONDS, inf if s is None else s) for name, s in asked.items()}


def _longest(limits: dict[str, float]) -> float:
    return max(limits.get("read", 0.0), limits.get("connect", 0.0))


def _names(capabilities: Capabilities, model: str | None) -> bool:
    """Whether the capabilities are for this model by name. A request without a name goes to any model."""
    return model is None or capabilities.model in ("", model)


def _read(body: object) -> Capabilities | None:
    try:
        capabilities = Capabilities.model_validate(body)
    except ValidationError:  # a page or a catch-all route, not our document
        return None
    # All fields count as set: a server does not have what it leaves out, so `assumed` must not add it.
    return capabilities.model_copy(update=dict(capabilities)) if capabilities.version == 1 else None

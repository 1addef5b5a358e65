"""Does this server route? `GET /whiflash/capabilities`, asked once per base URL."""

from __future__ import annotations

import asyncio
import warnings
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit
from weakref import WeakKeyDictionary

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, ValidationError

from whiflash_sdk.errors import UnsupportedServerError, UnsupportedServerWarning

TIMEOUT_SECONDS: Final = 5.0


class Capabilities(BaseModel):
    """What a WhiFlash server says of itself (`docs/hints.md`); unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    version: int
    server_version: str = ""
    model: str = ""
    policy: str = ""
    arms: tuple[str, ...] = ()
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None


@dataclass
class _Server:
    """What is known of one base URL. One caller asks; those that come meanwhile wait and take its answer.

    Threads wait at one lock and the tasks of an event loop at another, because a thread that waits for a task of
    its own loop would wait for ever.

    settled: it answered, or let the time run out. asked: how often it was asked.
    """

    settled: bool = False
    found: Capabilities | None = None
    asked: int = 0
    warned: bool = False
    threads: Lock = field(default_factory=Lock)
    tasks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = field(
        default_factory=WeakKeyDictionary
    )

    def is_to_be_asked(self, asked_before: int) -> bool:
        """Whether nobody has, since the caller found it asked `asked_before` times and began to wait."""
        return not self.settled and self.asked == asked_before

    def answered(self, body: object) -> None:
        self.found = _read(body)
        self.settled = True
        self.asked += 1

    def failed(self, error: openai.APIError) -> None:
        """An answer, or silence until the time-out, settles it; a refused connection is asked again."""
        self.settled = isinstance(error, openai.APITimeoutError) or not isinstance(
            error, openai.APIConnectionError
        )
        self.asked += 1


_servers: dict[str, _Server] = {}


def capabilities(client: OpenAI) -> Capabilities | None:
    """The server's capabilities; None if it does not route or cannot be reached."""
    url = _url(client)
    server = _servers.setdefault(url, _Server())
    asked = server.asked
    if not server.settled:
        with server.threads:
            if server.is_to_be_asked(asked):
                try:
                    server.answered(client.get(url, cast_to=object, options=_options()))
                except openai.APIError as error:
                    server.failed(error)
    return server.found


async def async_capabilities(client: AsyncOpenAI) -> Capabilities | None:
    """`capabilities` for an async client."""
    url = _url(client)
    server = _servers.setdefault(url, _Server())
    asked = server.asked
    if not server.settled:
        async with server.tasks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            if server.is_to_be_asked(asked):
                try:
                    server.answered(await client.get(url, cast_to=object, options=_options()))
                except openai.APIError as error:
                    server.failed(error)
    return server.found


def require(found: Capabilities | None, client: OpenAI | AsyncOpenAI, *, strict: bool) -> None:
    """Complain if the server does not route: an error under `strict`, else one warning per base URL.

    Raises: UnsupportedServerError under `strict`.
    """
    if found is not None:
        return
    reason = f"{_url(client)} does not answer as a WhiFlash server does"
    if strict:
        raise UnsupportedServerError(f"{reason}: start it with `whiflash serve`, or wrap with strict=False")
    server = _servers.get(_url(client))
    if server is not None and server.settled and not server.warned:
        server.warned = True
        warnings.warn(f"{reason}; requests go out without hints", UnsupportedServerWarning, stacklevel=2)


def _url(client: OpenAI | AsyncOpenAI) -> str:
    """The server's root is the base URL without its API version: `/v1` is where OpenAI's routes live."""
    base = urlsplit(str(client.base_url))
    root = base.path.rstrip("/").removesuffix("/v1")
    return urlunsplit((base.scheme, base.netloc, f"{root}/whiflash/capabilities", "", ""))


def _options() -> Any:
    return {"max_retries": 0, "timeout": TIMEOUT_SECONDS}


def _read(body: object) -> Capabilities | None:
    try:
        found = Capabilities.model_validate(body)
    except ValidationError:  # a page or a catch-all route, not our document
        return None
    return found if found.version == 1 else None

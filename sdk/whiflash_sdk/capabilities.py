"""Does this server route? `GET /whiflash/capabilities`, asked once per base URL."""

from __future__ import annotations

import warnings
from threading import Lock
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

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


_known: dict[str, Capabilities | None] = {}
_known_lock = Lock()


def capabilities(client: OpenAI) -> Capabilities | None:
    """The server's capabilities; None if it does not route or cannot be reached."""
    url = _url(client)
    if url in _known:
        return _known[url]
    try:
        body: Any = client.get(url, cast_to=object, options=_options())
    except openai.APIError as error:
        _failed(url, error)
        return None
    return _remember(url, _read(body))


async def async_capabilities(client: AsyncOpenAI) -> Capabilities | None:
    """`capabilities` for an async client."""
    url = _url(client)
    if url in _known:
        return _known[url]
    try:
        body: Any = await client.get(url, cast_to=object, options=_options())
    except openai.APIError as error:
        _failed(url, error)
        return None
    return _remember(url, _read(body))


def require(found: Capabilities | None, client: OpenAI | AsyncOpenAI, *, strict: bool) -> None:
    """Complain if the server does not route: an error under `strict`, else one warning per base URL.

    Raises: UnsupportedServerError under `strict`.
    """
    if found is not None:
        return
    reason = f"{_url(client)} does not answer as a WhiFlash server does"
    if strict:
        raise UnsupportedServerError(f"{reason}: start it with `whiflash serve`, or wrap with strict=False")
    if _url(client) in _known and _url(client) not in _warned:
        _warned.add(_url(client))
        warnings.warn(f"{reason}; requests go out without hints", UnsupportedServerWarning, stacklevel=2)


_warned: set[str] = set()


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


def _failed(url: str, error: openai.APIError) -> None:
    """An answer, or silence until the time-out, settles it; a refused connection is asked again."""
    if isinstance(error, openai.APITimeoutError) or not isinstance(error, openai.APIConnectionError):
        _remember(url, None)


def _remember(url: str, found: Capabilities | None) -> Capabilities | None:
    with _known_lock:
        return _known.setdefault(url, found)

"""HTTP clients that send hints as `wrap` does, for libraries that take an `http_client`.

OpenAI(http_client=whiflash_sdk.http_client())
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, overload

import anyio.to_thread
from anyio.lowlevel import RunVar
from typing_extensions import Unpack

from whiflash_sdk.collecting import open_scope
from whiflash_sdk.errors import HintError
from whiflash_sdk.flow import Flow, of_loop, run, run_async
from whiflash_sdk.identity import OfRequest, base_classes
from whiflash_sdk.outgoing import REFUSALS, ClientSettings, Told, at_once, exchange, route_of, salted
from whiflash_sdk.reading import TooDeepError, edit_json, read_json
from whiflash_sdk.streaming import decodes, watch

if TYPE_CHECKING:
    from openai import DefaultAsyncHttpxClient, DefaultHttpxClient

LONGEST: Final = 8 * 2**20
"""Most bytes of a body that is parsed. Longer ones get the fields of the settings, but nothing derived from it."""
BRIEF: Final = 2**17
"""Bytes from which a body is parsed in a thread, so that the event loop does not wait for it."""
_THREADS: Final[RunVar[anyio.CapacityLimiter]] = RunVar("whiflash_threads")
"""Limiter of the four threads that parse bodies. All threads of anyio's own limiter may be waiting for a request."""
_OBJECT: Final = re.compile(rb"[ \t\r\n]*\{")


class HttpClient(Protocol):
    """Members that the clients of HTTPX and HTTPX 2 share, for type checkers."""

    follow_redirects: bool

    @property
    def is_closed(self) -> bool:
        """Whether the client was closed."""


HttpT = TypeVar("HttpT", bound=HttpClient)


@overload
def http_client(inner: None = None, **settings: Unpack[ClientSettings]) -> DefaultHttpxClient: ...
@overload
def http_client(inner: HttpT, **settings: Unpack[ClientSettings]) -> HttpT: ...
def http_client(inner: Any = None, **settings: Unpack[ClientSettings]) -> Any:
    """Return an HTTP client that sends routing hints with completions, responses and messages, and takes traces out.

    Libraries that take an HTTP client need no support of their own: hints are added by the same code as in `wrap`.
    The server is asked with the headers of the request, once for each address and authentication.

    inner: the client that sends, with its proxies, certificates and authentication: an `httpx.Client`, or an
        `httpx2.Client` for libraries that are built on HTTPX 2. None: OpenAI's own default.
    settings: as for `wrap`. Under `strict` the library raises UnsupportedServerError or HintError, or its own
        connection error with that cause.

    Returns: a client of the same HTTP library. Closing it closes `inner`.

    Raises: TypeError if `inner` is something else.
    """
    import openai

    return _above(inner or openai.DefaultHttpxClient(), "Client", settings)


@overload
def async_http_client(inner: None = None, **settings: Unpack[ClientSettings]) -> DefaultAsyncHttpxClient: ...
@overload
def async_http_client(inner: HttpT, **settings: Unpack[ClientSettings]) -> HttpT: ...
def async_http_client(inner: Any = None, **settings: Unpack[ClientSettings]) -> Any:
    """Return an `http_client` for asynchronous clients: above an `httpx.AsyncClient` or `httpx2.AsyncClient`."""
    import openai

    return _above(inner or openai.DefaultAsyncHttpxClient(), "AsyncClient", settings)


def _above(inner: Any, name: str, settings: ClientSettings) -> Any:
    client = next((client for client in base_classes(name) if isinstance(inner, client)), None)
    if client is None:
        raise TypeError(f"inner: give {name} of httpx or httpx2, not {type(inner).__name__}")
    library = sys.modules[client.__module__.partition(".")[0]]
    transport = _transports(library)[name == "AsyncClient"](inner, Told.of(**settings))
    names = ("headers", "params", "cookies", "base_url", "timeout", "follow_redirects")
    transport.owner = client(transport=transport, **{name: getattr(inner, name) for name in names})
    open_scope(transport.owner)
    return transport.owner


@functools.cache
def _transports(library: Any) -> tuple[type, type]:
    """Return the sync and the async transport class of an HTTP library; both send requests through `_exchange`."""

    class Shared:
        owner: Any
        is_async = False

        def __init__(self, inner: Any, told: Told) -> None:
            self.library, self.inner, self.told = library, inner, told
            self.send = functools.partial(inner.send, stream=True, follow_redirects=False)

    class Sync(Shared, library.BaseTransport):  # type: ignore[misc]
        def handle_request(self, request: Any) -> Any:
            return run(_exchange(self, request))

        def close(self) -> None:
            self.inner.close()

    class Async(Shared, library.AsyncBaseTransport):  # type: ignore[misc]
        is_async = True

        async def handle_async_request(self, request: Any) -> Any:
            return await run_async(_exchange(self, request))

        async def aclose(self) -> None:
            await self.inner.aclose()

    return Sync, Async


async def _joined(parts: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in parts])


class _FailedError(Exception):
    """The answer has no success status. response: its status and text, as in clients' errors. answer: unchanged."""

    def __init__(self, answer: Any, text: str) -> None:
        self.answer, self.response = answer, SimpleNamespace(status_code=answer.status_code, text=text)


def _exchange(way: Any, request: Any) -> Flow[Any]:
    """Send a request, with hints if its route takes them, and return the answer. way: the transport that sends."""
    route = route_of(request.url.path) if request.method == "POST" else None
    if route is None:
        return (yield way.send(request))
    content = yield (request.aread() if way.is_async else request.read())
    work: Callable[..., Any] = at_once
    if way.is_async and len(content) >= BRIEF:
        run_sync: Any = anyio.to_thread.run_sync
        work = functools.partial(run_sync, limiter=of_loop(_THREADS, lambda: anyio.CapacityLimiter(4)))
    body = yield work(_read, content)
    if body is None:
        return (yield way.send(request))

    def send(edited: Mapping[str, Any]) -> Flow[Any]:
        carrying = yield work(_carrying, way.library, request, content, body, edited)
        answer, text = (yield way.send(carrying)), ""
        if answer.status_code in REFUSALS:
            raw = yield (_joined(answer.aiter_raw()) if way.is_async else b"".join(answer.iter_raw()))
            answer, text = _unread(way.library, answer, raw), _text(way.library, answer, raw)
        if not answer.is_success:
            raise _FailedError(answer, text)
        return answer

    steps: dict[str, Any] = {"asker": _asker(way, request, route), "is_async": way.is_async, "send": send}
    steps |= {"take": watch, "work": work, "fails": _FailedError}
    try:
        return (yield from exchange(way.owner, way.told, route, body, **steps))
    except HintError:  # hints of the request itself, which the server will refuse or a later release understands
        if way.told.strict:
            raise
        carrying = yield work(_carrying, way.library, request, content, body, {**body, **salted(body, way.told)})
        return (yield way.send(carrying))
    except _FailedError as failed:
        return failed.answer


def _read(content: bytes) -> dict[str, Any] | None:
    """Parse the body of a request; None if it is no JSON object. If it is too long or too deep, the result is empty, so
    that the fields of the settings are added in front of its own."""
    if len(content) > LONGEST:
        return {} if _OBJECT.match(content) else None
    try:
        body = read_json(content.decode())
    except TooDeepError:
        return {} if _OBJECT.match(content) else None
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _asker(way: Any, request: Any, route: str) -> OfRequest:
    path = request.url.raw_path.partition(b"?")[0].removesuffix(b"/" + route.removeprefix("v1/").encode())
    return OfRequest(way.inner, request, str(request.url.copy_with(raw_path=path)))


def _carrying(library: Any, request: Any, content: bytes, own: Mapping[str, Any], body: Mapping[str, Any]) -> Any:
    """Return the request with this body; the same object if the body is unchanged."""
    edited = edit_json(content, own, body)
    if edited is content:
        return request
    gone = (b"content-length", b"transfer-encoding", b"accept-encoding")
    headers = [(name, value) for name, value in request.headers.raw if name.lower() not in gone]
    if "accept-encoding" in request.headers:  # the SDK must be able to read a refusal
        codings = request.headers["accept-encoding"].split(",")
        kept = [coding for coding in codings if decodes(library, coding.partition(";")[0].strip().lower())]
        headers.append((b"accept-encoding", ",".join(kept).strip().encode() or b"identity"))
    return type(request)(request.method, request.url, headers=headers, content=edited, extensions=request.extensions)


def _text(library: Any, response: Any, raw: bytes) -> str:
    """Decode the text of an answer; empty if its content coding is broken."""
    try:
        return str(library.Response(response.status_code, headers=response.headers.raw, content=raw).text)
    except library.DecodingError:
        return ""


def _unread(library: Any, response: Any, raw: bytes) -> Any:
    """Return a copy of a response whose raw bytes were read, which the caller can read again."""
    return type(response)(
        response.status_code,
        headers=response.headers.raw,
        stream=library.ByteStream(raw),
        extensions=response.extensions,
    )

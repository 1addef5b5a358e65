"""Hints below the client: an HTTP client for whoever takes an `http_client`, which does what `wrap` does.

OpenAI(http_client=whiflash_sdk.http_client())
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from typing_extensions import Unpack

from whiflash_sdk.capabilities import Server, ask, async_ask
from whiflash_sdk.collecting import open_scope, start
from whiflash_sdk.errors import HintError
from whiflash_sdk.identity import OfRequest, base_classes
from whiflash_sdk.outgoing import REFUSALS, Outgoing, Settings, Told, model_of, route_of
from whiflash_sdk.reading import read_json
from whiflash_sdk.streaming import watch

if TYPE_CHECKING:
    from openai import DefaultAsyncHttpxClient, DefaultHttpxClient


class HttpClient(Protocol):
    """What the clients of HTTPX and HTTPX 2 have in common, for type checkers."""

    follow_redirects: bool

    @property
    def is_closed(self) -> bool:
        """Whether it can send no more."""


HttpT = TypeVar("HttpT", bound=HttpClient)


@overload
def http_client(inner: None = None, **settings: Unpack[Settings]) -> DefaultHttpxClient: ...
@overload
def http_client(inner: HttpT, **settings: Unpack[Settings]) -> HttpT: ...
def http_client(inner: Any = None, **settings: Unpack[Settings]) -> Any:
    """An HTTP client that sends routing hints with completions, responses and messages, and takes traces out.

    Libraries that take an HTTP client need no support of their own: hints go in as `wrap` puts them in, by the same
    code. The server is asked with the headers of the request, once for each address and authentication.

    inner: the client that sends, with its proxies, certificates and authentication: an `httpx.Client`, or an
        `httpx2.Client` for libraries that are built on HTTPX 2. None: OpenAI's own default.
    settings: those of `wrap`. Under `strict` the library raises UnsupportedServerError, or its own
        connection error with that cause.

    Returns: a client of the same HTTP library. Closing it closes `inner`.

    Raises: TypeError if `inner` is something else.
    """
    import openai

    return _above(inner or openai.DefaultHttpxClient(), "Client", settings)


@overload
def async_http_client(inner: None = None, **settings: Unpack[Settings]) -> DefaultAsyncHttpxClient: ...
@overload
def async_http_client(inner: HttpT, **settings: Unpack[Settings]) -> HttpT: ...
def async_http_client(inner: Any = None, **settings: Unpack[Settings]) -> Any:
    """`http_client` for asynchronous clients: `httpx.AsyncClient` and `httpx2.AsyncClient`."""
    import openai

    return _above(inner or openai.DefaultAsyncHttpxClient(), "AsyncClient", settings)


def passing_client(inner: Any, settings: Settings) -> Any:
    """`async_http_client` for a proxy: answers pass unread, traces included."""
    return _above(inner, "AsyncClient", settings, reads=False)


def _above(inner: Any, name: str, settings: Settings, *, reads: bool = True) -> Any:
    base = next((base for base in base_classes(name) if isinstance(inner, base)), None)
    if base is None:
        raise TypeError(f"inner: give {name} of httpx or httpx2, not {type(inner).__name__}")
    library = sys.modules[base.__module__.partition(".")[0]]
    transport = _transports(library)[name == "AsyncClient"](inner, Told.of(**settings), reads)
    names = ("headers", "params", "cookies", "base_url", "timeout", "follow_redirects")
    transport.owner = base(transport=transport, **{name: getattr(inner, name) for name in names})
    open_scope(transport.owner)
    return transport.owner


@functools.cache
def _transports(library: Any) -> tuple[type, type]:
    """The transports of an HTTP library."""

    class Sync(library.BaseTransport):  # type: ignore[misc]
        owner: Any

        def __init__(self, inner: Any, told: Told, reads: bool) -> None:
            self._inner, self._told, self._reads = inner, told, reads

        def handle_request(self, request: Any) -> Any:
            send = functools.partial(self._inner.send, stream=True, follow_redirects=False)
            route = _route(request)
            body = _parsed(request.read()) if route else None
            if route is None or body is None:
                return send(request)
            server = None
            if self._told.capabilities is None:
                server = ask(_asker(self._inner, request, route), model=model_of(body))
            going = _going(body, route, self._told, server)
            if going is None:
                return send(request)
            call = start(self.owner, going.agent)
            response = send(_carrying(request, body, going.body))
            if response.status_code in REFUSALS:
                response.read()
                refused = going.refused(response.status_code, response.text)
                if refused is None:
                    return _whole(response)
                response = send(_carrying(request, body, going.plain))
                if response.is_success:
                    going.served_without(refused)
            if self._reads and going.traced and response.is_success:
                watch(response, call, whole_text=going.whole_text)
            return response

        def close(self) -> None:
            self._inner.close()

    class Async(library.AsyncBaseTransport):  # type: ignore[misc]
        owner: Any

        def __init__(self, inner: Any, told: Told, reads: bool) -> None:
            self._inner, self._told, self._reads = inner, told, reads

        async def handle_async_request(self, request: Any) -> Any:
            send = functools.partial(self._inner.send, stream=True, follow_redirects=False)
            route = _route(request)
            body = _parsed(await request.aread()) if route else None
            if route is None or body is None:
                return await send(request)
            server = None
            if self._told.capabilities is None:
                server = await async_ask(_asker(self._inner, request, route), model=model_of(body))
            going = _going(body, route, self._told, server)
            if going is None:
                return await send(request)
            call = start(self.owner, going.agent)
            response = await send(_carrying(request, body, going.body))
            if response.status_code in REFUSALS:
                await response.aread()
                refused = going.refused(response.status_code, response.text)
                if refused is None:
                    return _whole(response)
                response = await send(_carrying(request, body, going.plain))
                if response.is_success:
                    going.served_without(refused)
            if self._reads and going.traced and response.is_success:
                watch(response, call, whole_text=going.whole_text)
            return response

        async def aclose(self) -> None:
            await self._inner.aclose()

    return Sync, Async


def _route(request: Any) -> str | None:
    return route_of(request.url.path) if request.method == "POST" else None


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        body = read_json(content)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _asker(inner: Any, request: Any, route: str) -> OfRequest:
    path = request.url.path.removesuffix("/" + route.removeprefix("v1/"))
    return OfRequest(inner, request, str(request.url.copy_with(path=path, query=None)))


def _going(body: dict[str, Any], route: str, told: Told, server: Server | None) -> Outgoing | None:
    try:
        return Outgoing(body, route, told, server)
    except HintError:  # of the request's own: the server's refusal names it
        return None


def _carrying(request: Any, own: Mapping[str, Any], body: Mapping[str, Any]) -> Any:
    """The request with this body; the same one if it is its own."""
    if body == own:
        return request
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    headers = [(name, value) for name, value in request.headers.multi_items() if name != "content-length"]
    content = text.encode(errors="surrogatepass")
    return type(request)(
        request.method, request.url, headers=headers, content=content, extensions=request.extensions
    )


def _whole(response: Any) -> Any:
    """A response that was read, to be read again."""
    gone = ("content-encoding", "content-length", "transfer-encoding")
    headers = [(name, value) for name, value in response.headers.multi_items() if name not in gone]
    return type(response)(
        response.status_code, headers=headers, content=response.content, extensions=response.extensions
    )

"""A proxy for agents that are not Python, or take no HTTP client: `whiflash proxy --url URL`.

An ASGI application. Requests get what `http_client` adds; a tenant named to it is final; answers pass byte for byte.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final
from urllib.parse import quote, unquote

import anyio.to_thread
import httpx
from typing_extensions import Unpack

from whiflash_sdk.errors import UnsupportedServerError
from whiflash_sdk.outgoing import ClientSettings, route_of
from whiflash_sdk.reading import edit_json, read_json
from whiflash_sdk.session import Session
from whiflash_sdk.transport import passing_client

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

LONGEST_BODY: Final = 64 * 2**20
IDLE_SECONDS: Final = 2.0
"""An idle connection to the server is kept this long. Uvicorn closes its side after five, httpx's own default: a
request at that moment would fail."""
_PREFIX: Final = b"x-whiflash-"
_HOPS: Final = frozenset(
    [b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect"]
)
_NAMED: Final = re.compile(r"((?:/(?:agent|session|tenant)=[^/]*)*)(/.*)", re.DOTALL)
"""Names of the asker, in front of the path for the server."""
ROUTES: Final = re.compile(
    r"/v1/(?:chat/completions|completions|embeddings|rerank|score|classify|decisions|systemone"
    r"|tokenize|detokenize"
    r"|messages(?:/count_tokens)?|responses(?:/\w[\w.-]*(?:/cancel)?)?|models(?:/\w[\w.:@+-]*)*"
    r"|audio/transcriptions)|/whiflash/capabilities",
    re.ASCII,
)
"""Paths that are passed on, decoded. No other reaches the server: some steer it."""


class Proxy:
    """Passes answers' routes below `/v1` and the capabilities on to one server.

    url: the server's root URL.
    inner: the client that sends; None: one without limits but 10 s to connect.
    longest_body: bytes; a longer request is answered 413.
    settings: those of `wrap`, for requests that say nothing else. Traces come to requests that ask for them alone.

    Raises: ValueError if `url` is no root URL.
    """

    def __init__(
        self,
        url: str,
        inner: httpx.AsyncClient | None = None,
        *,
        longest_body: int = LONGEST_BODY,
        **settings: Unpack[ClientSettings],
    ) -> None:
        timeout = httpx.Timeout(None, connect=10)
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=100, keepalive_expiry=IDLE_SECONDS
        )
        settings.setdefault("trace", False)
        self._upstream = url.rstrip("/").removesuffix("/v1")
        self._root = _root(self._upstream)
        self._longest = longest_body
        self._via = f"whiflash-{secrets.token_hex(8)}".encode()
        sender = inner or httpx.AsyncClient(timeout=timeout, limits=limits)
        self._client = passing_client(sender, settings, f"{self._upstream}/v1")

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await _refuse_socket(scope, send)
        elif scope["type"] == "http":
            async with anyio.create_task_group() as group:
                await self._answer(scope, receive, send, group)
                group.cancel_scope.cancel()

    async def _live(self, receive: Receive, send: Send) -> None:
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await self._client.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(
        self, scope: Mapping[str, Any], receive: Receive, send: Send, group: anyio.abc.TaskGroup
    ) -> None:
        sent: Headers = list(scope["headers"])
        if any(name.lower() == b"via" and self._via in value for name, value in sent):
            return await _refuse(
                send, 508, "the proxy's upstream leads back to the proxy: give it a server's URL"
            )
        path = scope.get("raw_path") or quote(scope["path"], safe="/=:@").encode()
        front, url = self._address(path, scope.get("query_string", b""))
        if isinstance(url, str):
            return await _refuse(send, 400, url)
        if not self._is_open(url):
            return await _refuse(
                send, 404, "the proxy passes on only the routes of answers, and /whiflash/capabilities"
            )
        try:
            session = _session(front, sent)
        except ValueError as error:
            return await _refuse(send, 400, str(error))
        body = await _read(receive, self._longest)
        if body is None:
            return await _refuse(send, 413, f"the request is longer than {self._longest} bytes")
        if session.tenant and scope["method"] == "POST" and route_of(url.path):
            try:
                body = await anyio.to_thread.run_sync(_of_tenant, body, session.tenant)
            except ValueError as error:
                return await _refuse(send, 400, f"tenant: needs a JSON object, uncompressed: {error}")
        group.start_soon(_cancelling, receive, group.cancel_scope)
        headers = [(name, value) for name, value in _passing(sent) if name.lower() != b"content-length"]
        request = httpx.Request(
            scope["method"],
            url,
            headers=[*headers, (b"via", b"1.1 " + self._via)],
            content=body,
            extensions={"timeout": self._client.timeout.as_dict()},
        )
        try:
            with session:
                answer = await self._client.send(request, stream=True, follow_redirects=False)
        except UnsupportedServerError as error:  # strict
            return await _refuse(send, 503, str(error))
        except httpx.LocalProtocolError:
            return await _refuse(send, 400, "the request holds what HTTP does not allow")
        except httpx.TimeoutException:
            return await _refuse(send, 504, "the server did not answer in time")
        except httpx.TransportError:
            return await _refuse(send, 502, "the server could not be reached")
        return await _pass(answer, send)

    def _address(self, path: bytes, query: bytes) -> tuple[str, httpx.URL | str]:
        """Names of the asker in the path, and the address for the server; or why there is none."""
        match = _NAMED.fullmatch(path.decode("latin-1"))
        front, rest = match.groups() if match else ("", "/")
        rest = rest.rstrip("/")  # a server would redirect the client past the proxy
        asked = quote(query, safe=_PRINTABLE)
        try:
            return front, httpx.URL(self._upstream + rest + (f"?{asked}" if asked else ""))
        except httpx.InvalidURL as error:
            return front, f"the request's address cannot be passed on: {error}"

    def _is_open(self, url: httpx.URL) -> bool:
        """Whether this address, which is the one that is sent, asks for a route of the list."""
        path, base = (address.raw_path.partition(b"?")[0].decode("ascii") for address in (url, self._root))
        base = base.rstrip("/")
        return path.startswith(base) and bool(ROUTES.fullmatch(unquote(path[len(base) :])))


_PRINTABLE: Final = "".join(map(chr, range(0x21, 0x7F)))


def _root(upstream: str) -> httpx.URL:
    shown = without_password(upstream)
    try:
        url = httpx.URL(upstream)
    except httpx.InvalidURL:
        raise ValueError(f"url: {shown!r} is no URL; give http://HOST:PORT") from None
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ValueError(f"url: {shown!r} is no root URL of a server; give http://HOST:PORT")
    return url


def without_password(url: str) -> str:
    """A URL as it may be printed, whether it is a right one or not."""
    return re.sub("^([a-z]*://)?.*@", r"\1", url, flags=re.DOTALL | re.IGNORECASE)


def _session(front: str, headers: Headers) -> Session:
    """Session of a request: `/agent=coder/tenant=acme` in front of the path, or headers, which win.

    Raises: ValueError for an empty name.
    """
    names = {}
    for field in front.split("/")[1:]:
        name, _, value = field.partition("=")
        names[name] = unquote(value)
    for key, header in headers:
        if key.lower().startswith(_PREFIX):
            names[key.lower().removeprefix(_PREFIX).decode("latin-1")] = _text(header)
    for name in ("agent", "session", "tenant"):
        if names.get(name) == "":
            raise ValueError(f"{name}: is empty. Give a name, or leave it out")
    return Session(tenant=names.get("tenant") or names.get("session"), agent=names.get("agent"))


def _of_tenant(content: bytes, tenant: str) -> bytes:
    """The body with this tenant in place of its own. Raises: ValueError if it is no JSON object."""
    body = read_json(content.decode())
    if not isinstance(body, dict):
        raise ValueError("the body is another value")
    rest = {name: value for name, value in body.items() if name != "extra_key"}
    return edit_json(content, body, {**rest, "cache_salt": tenant})


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _passing(headers: Headers) -> Headers:
    """Headers that are not only for the connection that they came by."""
    listed = [value.lower().split(b",") for name, value in headers if name.lower() == b"connection"]
    hops = _HOPS.union(name.strip() for names in listed for name in names)
    return [
        (name, value)
        for name, value in headers
        if name.lower() not in hops and not name.lower().startswith((_PREFIX, b"proxy-"))
    ]


async def _read(receive: Receive, longest: int) -> bytes | None:
    """The request's body; None if it is too long. A body that is too long is not kept."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if size > longest or message["type"] == "http.disconnect":  # who is gone reads no refusal
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _cancelling(receive: Receive, scope: anyio.CancelScope) -> None:
    """End a request whose client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _pass(answer: httpx.Response, send: Send) -> None:
    """The answer as it comes, no faster than its reader takes it. One that breaks off does so for the reader too."""
    headers = [(name.lower(), value) for name, value in _passing(answer.headers.raw)]
    try:
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        async for data in answer.aiter_raw():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    except httpx.TransportError:
        return
    finally:
        with anyio.CancelScope(shield=True):
            await answer.aclose()


async def _refuse(send: Send, status: int, message: str, kind: str = "http.response") -> None:
    body = json.dumps({"error": {"message": message, "type": "whiflash_proxy", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


async def _refuse_socket(scope: Mapping[str, Any], send: Send) -> None:
    if "websocket.http.response" in scope.get("extensions", ()):
        return await _refuse(send, 404, "the proxy passes on no websockets", "websocket.http.response")
    return await send({"type": "websocket.close"})

"""A proxy for agents that are not Python, or take no HTTP client: `whiflash proxy --upstream URL`.

An ASGI application. Requests get what `http_client` adds; answers pass byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final
from urllib.parse import unquote

import anyio
import httpx
from typing_extensions import Unpack

from whiflash_sdk.outgoing import Settings
from whiflash_sdk.session import Session
from whiflash_sdk.transport import passing_client

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]

NAMES: Final = ("tenant", "agent", "session")
"""What `X-WhiFlash-…` headers and parts of the path in front of `/v1` may set."""
LONGEST_BODY: Final = 64 * 2**20
IDLE_SECONDS: Final = 2.0
"""An idle connection to the server is kept this long. Uvicorn closes its side after five, httpx's own default: a
request at that moment would fail."""
_PREFIX: Final = "x-whiflash-"
_HOPS: Final = frozenset(
    ["connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-length"]
)
_CAPABILITIES: Final = "/whiflash/capabilities"


class Proxy:
    """Passes `/v1/…` and the capabilities on to one server.

    upstream: the server's root URL.
    inner: the client that sends; None: one without limits but 10 s to connect.
    longest_body: bytes; a longer request is answered 413.
    settings: those of `wrap`, for requests that say nothing else. Traces come to requests that ask for them alone.
    """

    def __init__(
        self,
        upstream: str,
        inner: httpx.AsyncClient | None = None,
        *,
        longest_body: int = LONGEST_BODY,
        **settings: Unpack[Settings],
    ) -> None:
        timeout = httpx.Timeout(None, connect=10)
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=100, keepalive_expiry=IDLE_SECONDS
        )
        settings.setdefault("trace", False)
        self._upstream = upstream.rstrip("/").removesuffix("/v1")
        self._longest = longest_body
        sender = inner or httpx.AsyncClient(timeout=timeout, limits=limits)
        self._client = passing_client(sender, settings, f"{self._upstream}/v1")

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
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
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        path, said = _said(scope.get("raw_path", scope["path"].encode()).decode("latin-1"), headers)
        if path is None:
            return await _refuse(send, 404, "the proxy passes on only /v1/… and /whiflash/capabilities")
        body = await _read(receive, self._longest)
        if body is None:
            return await _refuse(send, 413, f"the request is longer than {self._longest} bytes")
        group.start_soon(_cancelling, receive, group.cancel_scope)
        query = scope.get("query_string", b"").decode("latin-1")
        request = httpx.Request(
            scope["method"],
            self._upstream + path + (f"?{query}" if query else ""),
            headers=[(name, value) for name, value in headers if _passes(name)],
            content=body,
            extensions={"timeout": self._client.timeout.as_dict()},
        )
        try:
            with Session(tenant=said.get("tenant") or said.get("session"), agent=said.get("agent")):
                answer = await self._client.send(request, stream=True, follow_redirects=False)
        except httpx.TimeoutException:
            return await _refuse(send, 504, "the server did not answer in time")
        except httpx.TransportError:
            return await _refuse(send, 502, "the server could not be reached")
        return await _pass(answer, send)


def _said(path: str, headers: list[tuple[str, str]]) -> tuple[str | None, dict[str, str]]:
    """The path for the server, and who asks: `/agent=coder/tenant=acme/v1/messages`, or headers, which win."""
    front, mark, rest = path.partition("/v1/")
    parts = [part.partition("=") for part in front.split("/") if part]
    known = mark and all(name in NAMES for name, _, _ in parts)
    said = {name: unquote(value) for name, _, value in parts}
    said |= {
        name.lower().removeprefix(_PREFIX): value
        for name, value in headers
        if name.lower().startswith(_PREFIX)
    }
    if path == _CAPABILITIES:
        return path, {}
    return (mark + rest if known else None), said


def _passes(name: str) -> bool:
    name = name.lower()
    return name not in _HOPS and not name.startswith((_PREFIX, "proxy-"))


async def _read(receive: Receive, longest: int) -> bytes | None:
    """The request's body; None if it is too long. What is too long is not kept."""
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
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in answer.headers.multi_items()
        if name.lower() == "content-length" or _passes(name)
    ]
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


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "whiflash_proxy", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

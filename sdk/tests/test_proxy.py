"""The proxy: what it adds, and that answers, clients and keys are left as they are. Its upstream is in process."""

import asyncio
import importlib
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import unquote

import pytest
from fake_server import CAPABILITIES, TRACE

from whiflash_sdk import Hints
from whiflash_sdk.hints import decode

httpx: Any = pytest.importorskip("httpx")
proxy: Any = importlib.import_module("whiflash_sdk.proxy")
Proxy, IDLE_SECONDS = proxy.Proxy, proxy.IDLE_SECONDS

ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Where?"}], "stream": True}
SECRET = "sk-secret"
EVENTS = [
    *(b'data: {"id":"r","choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % n for n in range(20)),
    b'data: {"choices":[],"sglext":{"whiflash":%s}}\n\n' % json.dumps(TRACE).encode(),
    b"data: [DONE]\n\n",
]


class Body(httpx.AsyncByteStream):
    """A stream that notes how far it was read, and that it was closed."""

    def __init__(self, breaks: bool = False) -> None:
        self.read, self.breaks, self.closed = 0, breaks, asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for event in EVENTS:
            await asyncio.sleep(0)
            self.read += 1
            yield event
            if self.breaks:
                raise httpx.RemoteProtocolError("gone")

    async def aclose(self) -> None:
        self.closed.set()


class Upstream(httpx.AsyncBaseTransport):
    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.bodies: list[Body] = []
        self.error: type[httpx.TransportError] | None = None
        self.status, self.breaks = 200, False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.error is not None:
            raise self.error("no")
        if request.url.path == "/whiflash/capabilities":
            routes = ["chat/completions", "completions", "messages"]
            return httpx.Response(200, json={**CAPABILITIES, "routes": routes})
        self.requests.append(request)
        self.bodies.append(Body(self.breaks))
        headers = {"content-type": "text/event-stream", "x-theirs": "1", "connection": "close"}
        return httpx.Response(self.status, headers=headers, stream=self.bodies[-1])

    def sent(self, index: int = -1) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.requests[index].content)
        return body

    def hints(self, index: int = -1) -> Hints:
        return decode(self.sent(index)["custom_params"]["whiflash"])


class Client:
    """One ASGI connection. reads: how many messages it takes before it takes no more; None: all."""

    def __init__(self, reads: int | None = None) -> None:
        self.messages: list[Mapping[str, Any]] = []
        self.reads, self.full, self.gone = reads, asyncio.Event(), asyncio.Event()

    async def ask(
        self, app: Any, path: str = "/v1/chat/completions", body: Any = ASKED, **headers: str
    ) -> "Client":
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        pending = [content[:10], content[10:]]

        async def receive() -> dict[str, Any]:
            if pending:
                return {"type": "http.request", "body": pending.pop(0), "more_body": bool(pending)}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, Any]) -> None:
            self.messages.append(message)
            if self.reads is not None and len(self.messages) >= self.reads:
                self.full.set()
                await asyncio.Event().wait()

        named = {"authorization": f"Bearer {SECRET}", "host": "proxy", **headers}
        scope: dict[str, Any] = {"type": "http", "method": "POST", "query_string": b"api-version=1"}
        scope |= {"path": unquote(path), "raw_path": path.encode()}
        scope |= {"headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in named.items()]}
        await app(scope, receive, send)
        return self

    @property
    def status(self) -> int:
        found: int = self.messages[0]["status"]
        return found

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def app(upstream: Upstream) -> Proxy:
    return Proxy(
        "http://server:1", httpx.AsyncClient(transport=upstream), longest_body=10_000, agent="default"
    )


def test_sixteen_streams_pass_beside_plain_ones(app: Proxy, upstream: Upstream) -> None:
    async def main() -> list[Client]:
        plain = httpx.AsyncClient(transport=upstream)
        asking = [Client().ask(app, x_whiflash_agent=f"a{number}") for number in range(16)]
        *clients, answer = await asyncio.gather(
            *asking, plain.post("http://server:1/v1/chat/completions", json=ASKED)
        )
        assert answer.content == b"".join(EVENTS)
        return clients

    clients = asyncio.run(main())
    assert {client.content for client in clients} == {b"".join(EVENTS)}
    assert all(body.closed.is_set() for body in upstream.bodies)
    told = [n for n in range(17) if "custom_params" in upstream.sent(n)]
    assert {upstream.hints(n).agent for n in told} == {f"a{number}" for number in range(16)}
    assert all({**upstream.sent(n), "custom_params": 0} == {**ASKED, "custom_params": 0} for n in told)
    headers = dict(clients[0].messages[0]["headers"])
    assert (headers[b"x-theirs"], b"connection" in headers) == (b"1", False)


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("/v1/chat/completions", {}, ("own", "own", "default")),
        (
            "/v1/chat/completions",
            {"X_WhiFlash_Tenant": "acme", "X_WhiFlash_Agent": "coder"},
            ("acme", None, "coder"),
        ),
        ("/v1/chat/completions", {"X_WhiFlash_Session": "s1"}, ("s1", None, "default")),
        ("/agent=my%20coder/tenant=acme/v1/messages", {}, ("acme", None, "my coder")),
        ("/agent=path/v1/completions", {"x_whiflash_agent": "header"}, ("own", "own", "header")),
    ],
)
def test_headers_and_the_path_say_who_asks(
    app: Proxy, upstream: Upstream, path: str, headers: dict[str, str], expected: Any
) -> None:
    """A tenant takes the place of the body's own."""
    asyncio.run(Client().ask(app, path, {**ASKED, "cache_salt": "own", "extra_key": "own"}, **headers))
    request = upstream.requests[0]
    found = [upstream.sent().get(name) for name in ("cache_salt", "extra_key")]
    assert (*found, upstream.hints().agent) == expected
    assert str(request.url) == f"http://server:1/v1/{path.partition('/v1/')[2]}?api-version=1"
    assert request.headers["authorization"] == f"Bearer {SECRET}"
    assert request.headers["host"] == "server:1"
    assert not [name for name in request.headers if "whiflash" in name]


def test_a_client_that_goes_ends_its_request(app: Proxy, upstream: Upstream) -> None:
    async def main() -> None:
        client = Client(reads=3)
        asking = asyncio.create_task(client.ask(app))
        await client.full.wait()
        client.gone.set()
        await asking
        assert upstream.bodies[0].closed.is_set()

    asyncio.run(main())
    assert upstream.bodies[0].read < len(EVENTS)


def test_a_slow_client_holds_up_nobody_and_its_stream_is_not_read_ahead(
    app: Proxy, upstream: Upstream
) -> None:
    async def main() -> None:
        slow = Client(reads=3)
        asking = asyncio.create_task(slow.ask(app))
        await slow.full.wait()
        quick = await asyncio.gather(*(Client().ask(app) for _ in range(4)))
        assert {client.content for client in quick} == {b"".join(EVENTS)}
        assert upstream.bodies[0].read == 2
        slow.gone.set()
        await asking

    asyncio.run(main())


def test_a_stream_that_breaks_off_is_no_whole_one(app: Proxy, upstream: Upstream) -> None:
    upstream.breaks = True
    client = asyncio.run(Client().ask(app))
    assert client.content == EVENTS[0]
    assert client.messages[-1]["more_body"]


def test_what_is_too_long_is_refused_and_what_is_not_ours_to_read_passes(
    app: Proxy, upstream: Upstream
) -> None:
    """So do refusals of the server, and a trace that the client asks for."""
    refused = asyncio.run(Client().ask(app, body=b"x" * 10_001))
    assert (refused.status, upstream.requests) == (413, [])
    traced = asyncio.run(Client().ask(app, body={**ASKED, **Hints(trace=True).extra_body()}))
    assert upstream.hints().trace is True
    upstream.status = 413
    for path, body in (("/v1/embeddings", b"not json"), ("/v1/chat/completions", ASKED)):
        passed = asyncio.run(Client().ask(app, path, body))
        assert (passed.status, passed.content) == (413, b"".join(EVENTS))
    assert traced.content == b"".join(EVENTS)


@pytest.mark.filterwarnings("ignore::whiflash_sdk.UnsupportedServerWarning")
def test_a_strict_proxy_says_why_it_refuses(upstream: Upstream) -> None:
    upstream.error = httpx.ConnectError
    strict = Proxy("http://server:1", httpx.AsyncClient(transport=upstream), strict=True)
    refused = asyncio.run(Client().ask(strict))
    assert (refused.status, b"could not be reached" in refused.content) == (503, True)


@pytest.mark.parametrize(("error", "status"), [(httpx.ConnectError, 502), (httpx.ReadTimeout, 504)])
@pytest.mark.filterwarnings("ignore::whiflash_sdk.UnsupportedServerWarning")
def test_keys_are_in_no_log_and_no_error(
    app: Proxy,
    upstream: Upstream,
    error: type[httpx.TransportError],
    status: int,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.DEBUG):
        asyncio.run(Client().ask(app))
        upstream.error = error
        client = asyncio.run(Client().ask(app, x_api_key=SECRET))
    assert client.status == status
    written = capfd.readouterr()
    everything = client.content.decode() + caplog.text + written.out + written.err
    assert SECRET not in everything


def test_an_idle_connection_is_left_before_the_server_leaves_it() -> None:
    """The upstream resets a connection that is used again after an idle while, as one does whose time is over just
    then."""
    used, body = 0, b"{}"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal used
        used += 1
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await reader.read(1)  # the next request, or the end
        writer.transport.abort()

    async def main() -> list[int]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        app = Proxy(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        found = [(await Client().ask(app, "/v1/embeddings")).status]
        await asyncio.sleep(IDLE_SECONDS + 0.2)
        found.append((await Client().ask(app, "/v1/embeddings")).status)
        server.close()
        return found

    assert asyncio.run(main()) == [200, 200]
    assert used >= 2

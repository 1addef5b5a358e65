"""The proxy between real sockets: what reaches the server, and what comes back, byte for byte."""

import asyncio
import gzip
import importlib
import json
import re
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from fake_server import CAPABILITIES, ROUTES, TRACE
from openai import OpenAI

from whiflash_sdk import UnsupportedServerWarning
from whiflash_sdk.hints import decode

httpx: Any = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
anthropic: Any = pytest.importorskip("anthropic")


ANSWER = {
    "id": "r",
    "object": "chat.completion",
    "created": 1,
    "model": "tiny",
    "sglext": {"whiflash": TRACE},
}
ANSWER |= {
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "x"}}]
}


@dataclass
class Recorder:
    """A server that answers every POST in the same way.

    answers: status, headers and body of the next answers; the last one is repeated.
    sent: path, headers and body of each POST. asked: headers of each question for capabilities.
    """

    answers: list[tuple[int, list[tuple[bytes, bytes]], bytes]] = field(
        default_factory=lambda: [(200, [(b"content-type", b"application/json")], json.dumps(ANSWER).encode())]
    )
    capabilities: dict[str, Any] = field(default_factory=lambda: {**CAPABILITIES, "routes": ROUTES})
    sent: list[tuple[bytes, list[tuple[bytes, bytes]], bytes]] = field(default_factory=list)
    asked: list[list[tuple[bytes, bytes]]] = field(default_factory=list)

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        parts = []
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        if scope["method"] == "POST":
            self.sent.append((scope["raw_path"], scope["headers"], b"".join(parts)))
            status, headers, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        else:
            self.asked.append(scope["headers"])
            found = (
                self.capabilities if scope["path"].endswith("/capabilities") else {"data": [{"id": "tiny"}]}
            )
            status, headers, body = 200, [], json.dumps(found).encode()
        headers = [*headers, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def body(self, index: int = -1) -> dict[str, Any]:
        """The body of one POST."""
        found: dict[str, Any] = json.loads(self.sent[index][2])
        return found


def refusal(
    status: int, reason: str, *, zipped: bool = False
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """An answer that refuses."""
    body = json.dumps({"error": {"message": reason}}).encode()
    headers = [(b"content-type", b"application/json")]
    return (status, [*headers, (b"content-encoding", b"gzip")], gzip.compress(body, mtime=0)) if zipped else (
        status, headers, body
    )  # fmt: skip


@contextmanager
def listening(*, to: Any, port: int = 0) -> Iterator[str]:
    """The URL of an application under uvicorn for the length of the block."""
    import uvicorn

    bound = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(to, lifespan="off", log_level="critical", server_header=False, date_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def exchange(
    url: str, target: bytes, body: bytes = b"{}", *headers: bytes, method: bytes = b"POST"
) -> tuple[int, bytes, bytes]:
    """Status, head and body of the answer to a request whose bytes are these."""
    host, _, port = url.removeprefix("http://").partition(":")
    lines = [b"%s %s HTTP/1.1" % (method, target), b"host: x", b"content-length: %d" % len(body), *headers]
    if not any(line.lower().startswith(b"connection:") for line in lines):
        lines.append(b"connection: close")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"\r\n".join([*lines, b"", body]))
        answer = b""
        while not _is_whole(answer) and (part := connection.recv(65536)):
            answer += part
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), head, rest


def _is_whole(answer: bytes) -> bool:
    """Whether it has all of the length that it names: one that refuses an upgrade leaves its connection open."""
    head, end, rest = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return bool(end and length) and len(rest) >= int(length[1])


proxy: Any = importlib.import_module("whiflash_sdk.proxy")
transport: Any = importlib.import_module("whiflash_sdk.transport")
CHAT = b"/v1/chat/completions"
BODY = b'{"model":"tiny","messages":[]}'

pytestmark = pytest.mark.filterwarnings("ignore::whiflash_sdk.UnsupportedServerWarning")


@pytest.fixture(scope="module")
def upstream() -> Iterator[tuple[Recorder, str]]:
    recorder = Recorder()
    with listening(to=recorder) as url:
        yield recorder, url


@pytest.fixture(scope="module")
def _proxied(upstream: tuple[Recorder, str]) -> Iterator[str]:
    with listening(to=proxy.Proxy(upstream[1], agent="default")) as url:
        yield url


@pytest.fixture
def server(upstream: tuple[Recorder, str]) -> Recorder:
    upstream[0].__init__()  # type: ignore[misc]
    return upstream[0]


@pytest.fixture
def url(_proxied: str, server: Recorder) -> str:
    return _proxied


STEERING = rb"""
/whiflash/policy /flush_cache /v1/../whiflash/policy /v1/../flush_cache /agent=a/v1/../flush_cache
/agent=a/v1/../../flush_cache /agent=../v1/../flush_cache /v1/%2e%2e/whiflash/policy /v1/.%2E/flush_cache
/v1/%252e%252e/flush_cache /v1/models/../../flush_cache /v1/models/%2e%2e/%2e%2e/flush_cache
/v1/models/..%2f..%2fflush_cache /v1/models/..;/..;/flush_cache /v1/models/..\..\flush_cache
/v1/responses/../../flush_cache /v1//../flush_cache //v1/chat/completions
/v1/./chat/completions/../../../flush_cache /v1/load_lora_adapter /V1/chat/completions
/v1/chat/completions%00 /whiflash/capabilities/../policy /v1/chat/completions/extra /other=a/v1/chat/completions
""".split()


def test_no_way_leads_to_another_route(url: str, server: Recorder) -> None:
    """httpx takes dots out of a path; the rest of it decides."""
    for target in STEERING:
        status, _, _ = exchange(url, target)
        assert (target, status, server.sent) == (target, 404, [])
    for target, sent in [
        (CHAT, CHAT),
        (CHAT + b"/", CHAT),
        (b"/v1/models/../chat/completions", CHAT),
        (b"/agent=a/tenant=b/v1/messages/count_tokens", b"/v1/messages/count_tokens"),
        (b"/v1/models/org/name-1.5", b"/v1/models/org/name-1.5"),
        (b"/v1/models/org%2Fname", b"/v1/models/org%2Fname"),
        (b"/v1/responses/resp_1/cancel", b"/v1/responses/resp_1/cancel"),
    ]:
        assert exchange(url, target)[0] == 200
        assert server.sent[-1][0] == sent
    status, _, found = exchange(url, b"/session=s/whiflash/capabilities", method=b"GET")
    assert (status, json.loads(found)) == (200, server.capabilities)


def test_headers_are_bytes_and_those_of_a_connection_end_with_it(url: str, server: Recorder) -> None:
    given = [
        (b"x-name", b"J\xf6rg"),
        (b"x-utf", "é".encode()),
        (b"x-hop", b"1"),
        (b"connection", b"X-Hop, close"),
    ]
    server.answers = [(200, given, b"{}")]
    status, head, _ = exchange(url, CHAT, BODY, *(b": ".join(pair) for pair in given), b"TE: trailers")
    sent = dict(server.sent[-1][1])
    assert (status, sent[b"x-name"], sent[b"x-utf"]) == (200, b"J\xf6rg", "é".encode())
    assert b"x-name: J\xf6rg\r\n" in head + b"\r\n"
    assert b"x-hop" not in sent
    assert b"x-hop" not in head.lower()
    assert b"te" not in sent
    assert b"custom_params" in server.sent[-1][2]


EXACT = (
    b'{ "model":"tiny", "messages" : [{"role":"user","content":"\\ud800 \\u00e9 \xc3\xa9"}],\n'
    b' "temperature":1.0e0,"seed":123456789012345678901234567890,"top_p":0.10000000000000000001,"n":1,"n":1.0,'
    b'"x":1e400, "y":-0.0 }'
)


def test_what_is_not_ours_in_a_body_stays_as_it_was_written(url: str, server: Recorder) -> None:
    exchange(url, CHAT, EXACT, b"X-WhiFlash-Tenant: acme")
    sent = server.sent[-1][2]
    assert sent.endswith(EXACT[1:])
    assert (server.body()["cache_salt"], server.body()["n"]) == ("acme", 1.0)
    own = b'"custom_params": {"a": 1.5, "whiflash":"{\\"agent\\":\\"own\\"}"}'
    exchange(url, CHAT, EXACT[:-1] + b", " + own + b"}")
    sent = server.sent[-1][2]
    assert sent.count(b'"custom_params"') == 1
    assert decode(server.body()["custom_params"]["whiflash"]).agent == "own"
    assert (server.body()["custom_params"]["a"], server.body()["n"]) == (1.5, 1.0)
    exchange(url, CHAT, b" { } ")
    assert server.body().keys() == {"custom_params"}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"model":"tiny","x":%s}' % (b"[" * 3_000 + b"]" * 3_000), id="deep"),
        pytest.param(gzip.compress(BODY), id="zipped"),
        pytest.param(b"[]", id="no object"),
    ],
)
def test_a_body_that_is_not_read_has_no_tenant(url: str, server: Recorder, body: bytes) -> None:
    refused, _, reason = exchange(url, CHAT, body, b"X-WhiFlash-Tenant: acme")
    assert (refused, server.sent, b"tenant: needs a JSON object" in reason) == (400, [], True)
    assert exchange(url, CHAT, body)[0] == 200
    sent = server.sent[-1][2]
    assert sent.endswith(body[1:])
    assert (b"default" in sent) == body.startswith(b"{"), "hints need no reading"


def test_a_tenant_is_read_into_the_longest_body(url: str, server: Recorder) -> None:
    long = b'{"model":"tiny","cache_salt":"own","x":"%s"}' % (b"x" * transport.LONGEST)
    assert exchange(url, CHAT, long, b"X-WhiFlash-Tenant: acme")[0] == 200
    assert server.body()["cache_salt"] == "acme"


def test_long_bodies_are_read_beside_the_event_loop(
    url: str, server: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    read = transport._read

    def noted(content: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return read(content)

    monkeypatch.setattr(transport, "_read", noted)
    for size in (10, transport.BRIEF):
        exchange(url, CHAT, b'{"model":"tiny","x":"%s"}' % (b"x" * size))
    assert "AnyIO" not in threads[0]
    assert "AnyIO" in threads[1]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("status", [400, 422])
def test_a_client_reads_why_it_was_refused(url: str, server: Recorder, status: int, zipped: bool) -> None:
    server.answers = [refusal(status, "the prompt is too long", zipped=zipped)]
    client = OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match="too long") as raised:
            client.chat.completions.create(model="tiny", messages=[], stream=stream)
        assert raised.value.status_code == status
    messages = anthropic.Anthropic(base_url=url, api_key="k", max_retries=0).messages
    with pytest.raises(anthropic.APIStatusError, match="too long"):
        messages.create(model="tiny", max_tokens=1, messages=[])
    assert len(server.sent) == 3
    assert exchange(url, CHAT, BODY)[2] == server.answers[0][2]


def test_what_names_our_field_is_asked_without_it(url: str, server: Recorder) -> None:
    """Also where a client reads codings that the proxy does not: a refusal has to be read."""
    answered = (200, [], json.dumps(ANSWER).encode())
    server.answers = [refusal(400, "Unrecognized: custom_params", zipped=True), answered]
    headers = b"Accept-Encoding: br;q=1.0, gzip;q=0.8, x-own", b"X-WhiFlash-Tenant: acme"
    status, _, body = exchange(url, CHAT, BODY, *headers)
    assert (status, json.loads(body)) == (200, ANSWER)
    assert dict(server.sent[0][1])[b"accept-encoding"] == b"gzip;q=0.8"
    assert server.sent[1][2] == b'{"cache_salt":"acme",' + BODY[1:], "a tenant is no hint"
    assert dict(server.asked[0])[b"accept-encoding"] == b"identity"


def test_refusals_of_the_proxy_are_sentences(url: str, server: Recorder) -> None:
    upgrade = [b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"]
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    for target, headers, status, reason in [
        (b"/session=/v1/chat/completions", [], 400, b"session: is empty"),
        (CHAT, [b"X-WhiFlash-Tenant:"], 400, b"tenant: is empty"),
        (b"/agent=/v1/messages", [], 400, b"agent: is empty"),
        (b"/v1/realtime", [*upgrade, key], 404, b"the proxy passes on"),
    ]:
        body = b"" if b"realtime" in target else BODY
        method = b"GET" if b"realtime" in target else b"POST"
        found, _, said = exchange(url, target, body, *headers, method=method)
        assert (target, found) == (target, status)
        assert reason in said
    assert not server.sent


def test_an_address_beyond_what_is_sent_is_a_400() -> None:
    app, messages = proxy.Proxy("http://server:1"), []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": BODY}

    scope = {"type": "http", "method": "POST", "path": "/v1/models/x", "headers": []}
    for more in ({"raw_path": b"/v1/models/" + b"x" * 70_000}, {"query_string": b"x" * 70_000}):
        asyncio.run(app({**scope, **more}, receive, send))
    assert [message["status"] for message in messages[::2]] == [400, 400]
    assert b"too long" in messages[1]["body"]


def test_a_proxy_that_is_its_own_server_ends_the_circle() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    app = proxy.Proxy(f"http://127.0.0.1:{port}")
    with listening(to=app, port=port) as url:
        status, _, body = exchange(url, CHAT, BODY)
    assert status == 508
    assert b"leads back" in body


@pytest.mark.parametrize(
    "upstream",
    [
        "http://u:hunter2@",
        "u:hunter2@host",
        "http://u:hun/ter2@host:1",
        "http://u:hunter2@h/?x=1",
        "ftp://u:hunter2@h",
    ],
)
def test_no_server_at_an_address_is_said_without_the_password(upstream: str) -> None:
    with pytest.raises(ValueError, match=r"^url: .*; give http://HOST:PORT") as raised:
        proxy.Proxy(upstream)
    assert "ter2" not in str(raised.value)


def test_what_clients_send_is_neither_kept_nor_printed(url: str, server: Recorder) -> None:
    """Models and keys are anybody's text, and so are addresses."""
    capabilities: Any = sys.modules["whiflash_sdk.capabilities"]
    with warnings.catch_warnings(record=True) as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(capabilities, "MOST_WARNINGS", 8)
        patch.setattr(capabilities, "MOST_SERVERS", 4)
        warnings.simplefilter("always")
        for number in range(12):
            body = json.dumps({"model": f"{number}" + "m" * 10_000, "messages": []}).encode()
            server.capabilities["model"] = f"other{number}"
            exchange(url, b"/v1/models/%d/chat/completions" % number, body)
            exchange(url, CHAT, body, b"Authorization: Bearer %d" % number)
    assert len(capabilities._servers) <= 4
    texts = [str(one.message) for one in said if one.category is UnsupportedServerWarning]
    assert len(texts) <= 8
    assert all(len(text) < 500 for text in texts)

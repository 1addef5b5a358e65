"""`--whiflash-trust-tenant-header on`: whoever a gateway's header names asks, whatever the client writes.

The prefix cache shows the tenant: a prompt is cached for the tenant that has asked it before. Requests go over raw
sockets to a real server, under uvicorn's httptools where that is installed.
"""

import json
import random
import re
import socket
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import grpc
import pytest
from patience import wait_until
from server_host import Server, ServerHost
from tiny_models import served_pair
from typer.testing import CliRunner

from whiflash_lab.servers import free_port
from whiflash_sglang.cli import echo
from whiflash_sglang.cli.app import app
from whiflash_sglang.copying.tenants import tenant_of
from whiflash_sglang.http.callers import SESSIONS

pytestmark = pytest.mark.server

TENANT = b"X-WhiFlash-Tenant: "
ROUTES = ("/v1/chat/completions", "/invocations", "/v1/completions", "/v1/responses", "/v1/messages", "/generate")


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, host: ServerHost, grpc_port: int) -> Iterator[Server]:
    arguments = [*served_pair(tmp_path_factory.mktemp("checkpoints")), "--enable-cache-report"]
    arguments += ["--whiflash-trust-tenant-header", "on", "--grpc-port", str(grpc_port)]
    arguments += ["--enable-session-radix-cache"]
    with host.running(*arguments) as running:
        yield running


def prompt(seed: object) -> str:
    """A text that only this seed has."""
    return " ".join(random.Random(str(seed)).choices(["one", "two", "three", "four"], k=60))


def body_of(path: str, text: str, **more: Any) -> dict[str, Any]:
    if path == "/generate":
        return {"text": text, "sampling_params": {"max_new_tokens": 2}, **more}
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 2, **more}
    if path == "/v1/responses":
        return {**asked, "input": text}
    if path in ("/v1/completions", "/api/generate"):
        return {**asked, "prompt": text}
    return {**asked, "messages": [{"role": "user", "content": text}]}


def send(server: Server, head: list[bytes], body: bytes) -> tuple[int, bytes]:
    """Status and text of an answer to exactly these bytes."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        lines = [*head, b"Host: x", b"Connection: close", b"Content-Type: application/json", b"", b""]
        connection.sendall(b"\r\n".join(lines) + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]


def ask(server: Server, path: str, body: Any, *headers: bytes, method: bytes = b"POST") -> tuple[int, bytes]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    line = b"%s %s HTTP/1.1" % (method, path.encode())
    return send(server, [line, b"Content-Length: %d" % len(content), *headers], content)


def cached(answer: tuple[int, bytes]) -> int:
    """Tokens of the prompt that came from the prefix cache."""
    status, text = answer
    assert status == 200, text
    found = json.loads(text[text.index(b"{") : text.rindex(b"}") + 1])
    usage = found.get("usage") or found["meta_info"]
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or usage
    return int(details.get("cached_tokens") or details.get("cache_read_input_tokens") or 0)


@pytest.mark.parametrize("path", ROUTES)
def test_a_body_names_nobody(server: Server, path: str) -> None:
    """On every route, with keys of every form that the route takes."""
    text = prompt(path)
    victim, mine = f"victim {path}", f"acme {path}"
    assert cached(ask(server, path, body_of(path, text), TENANT + victim.encode())) == 0
    asked = body_of(path, text, cache_salt=victim, extra_key=victim)
    assert cached(ask(server, path, asked, TENANT + mine.encode())) == 0
    other = body_of(path, text, cache_salt="other")
    assert cached(ask(server, path, other, TENANT + mine.encode())) > 20
    assert cached(ask(server, path, other, b"x-whiflash-TENANT: " + victim.encode())) > 20


def closed(server: Server, session: str, tenant: bytes) -> int:
    """Leaves of the prefix cache that a session held, which this tenant closes."""
    assert ask(server, "/close_session", {"session_id": session}, TENANT + tenant)[0] == 200
    known = (tenant_of(None, tenant.decode()) or b"").hex()  # the log names no tenant
    pattern = re.compile(rf"release_session {known}\x1f{session}: indexed (\d+)")
    return int(wait_until(lambda: pattern.findall(server.log.read_text()))[-1])


@pytest.mark.parametrize(("path", "header"), zip(ROUTES, cycle(SESSIONS)))
def test_a_session_is_its_tenants(server: Server, path: str, header: str) -> None:
    """On every route, by every header that names one; a body's own name wins."""
    head, own = (f"{name}-{ROUTES.index(path)}" for name in ("head", "own"))
    headers = [TENANT + b"victim", f"{header}: {head}".encode()]
    assert ask(server, path, body_of(path, prompt(head)), *headers)[0] == 200
    assert ask(server, path, body_of(path, prompt(own), session_id=own), *headers)[0] == 200
    for name in (head, own):
        assert [closed(server, name, tenant) for tenant in (b"other", b"victim")] == [0, 1]


@pytest.mark.parametrize("path", ROUTES)
def test_a_preview_is_cached_for_its_tenant(server: Server, path: str) -> None:
    """On every route. Its answer is empty, and a batch, no session and no marker are refused."""
    text, tenant = prompt(f"preview {path}"), TENANT + b"previewer"

    def preview(prompt: Any, **more: Any) -> tuple[int, bytes]:
        asked = body_of(path, prompt, **more)
        holder = asked["sampling_params"] if path == "/generate" else asked
        holder["custom_params"] = {"whiflash": '{"preview": "MARK"}'}
        return ask(server, path, asked, tenant)

    status, answer = preview(f"{text} MARK", session_id="s")
    assert status == 200, answer
    following = body_of(path, f"{text} and more")
    assert cached(ask(server, path, following, TENANT + b"other")) < 20
    assert cached(ask(server, path, following, tenant)) >= len(text) - 8
    for wrong, why in ((preview(f"{text} MARK"), b"session"), (preview(text, session_id="s"), b"'MARK'")):
        assert (wrong[0], why in wrong[1]) == (400, True), wrong


def test_no_id_looks_like_another_tenants(server: Server) -> None:
    forged = {"session_id": "victim\x1fone", "capacity_of_str_len": 9}
    generated = body_of("/v1/completions", "one two", **forged)
    for path, asked in (("/close_session", forged), ("/open_session", forged), ("/v1/completions", generated)):
        status, text = ask(server, path, asked, TENANT + b"other")
        assert (status, b"control character" in text) == (400, True), path
        assert ask(server, path, json.dumps(asked).encode("utf-16"), TENANT + b"other")[0] == 400, path


def test_a_batch_has_one_tenant(server: Server) -> None:
    texts = [prompt("batch"), prompt("of two")]
    keys = ["batch victim", "batch victim"]
    for text, key in zip(texts, keys, strict=True):
        ask(server, "/generate", body_of("/generate", text, cache_salt=key), TENANT + b"batch victim")
    asked = {**body_of("/generate", ""), "text": texts, "cache_salt": keys, "extra_key": ["", ""]}
    for found in ([False, False], [True, True]):
        status, answer = ask(server, "/generate", asked, TENANT + b"batch acme")
        assert status == 200, answer
        assert [one["meta_info"]["cached_tokens"] > 20 for one in json.loads(answer)] == found


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ([], b"is missing"),
        ([b"X-WhiFlash-Tenant:"], b"is empty"),
        ([TENANT + b"a", TENANT + b"b"], b"twice with different values"),
        ([TENANT + b"caf\xe9"], b"not UTF-8"),
        ([TENANT + b"a", b"X-WhiFlash-Agent: x", b"X-WhiFlash-Agent: y"], b"X-WhiFlash-Agent: is there twice"),
    ],
)
def test_a_name_that_is_not_one_is_refused(server: Server, headers: list[bytes], why: bytes) -> None:
    for path in (*ROUTES, "/api/chat", "/api/generate"):
        for stream in (False, True):
            asked = body_of(path, "one two", rid="HEALTH_CHECK_me", cache_salt="victim", stream=stream)
            status, text = ask(server, path, asked, *headers)
            assert (status, why in text, b"X-WhiFlash-" in text) == (400, True, True), (path, text)


def test_names_are_whole(server: Server) -> None:
    """Two names that differ in one byte are two tenants; a header that says the same twice is one."""
    text = body_of("/generate", prompt("names"))
    first, second = TENANT + "café".encode(), TENANT + "cafè".encode()
    found = [cached(ask(server, "/generate", text, *lines)) > 20 for lines in ([first], [second], [first, first])]
    assert found == [False, False, True]


@pytest.mark.parametrize("head", [[TENANT + b"trailing acme"], []])
def test_a_trailer_names_nobody(server: Server, head: list[bytes]) -> None:
    text = body_of("/generate", prompt("trailer"))
    ask(server, "/generate", text, TENANT + b"trailing victim")
    content = json.dumps(text).encode()
    chunks = b"%x\r\n%s\r\n0\r\nX-WhiFlash-Tenant: trailing victim\r\n\r\n" % (len(content), content)
    lines = [b"POST /generate HTTP/1.1", b"Transfer-Encoding: chunked", *head]
    answer = send(server, lines, chunks)
    if head:
        assert cached(answer) == 0
    else:
        assert (answer[0], b"is missing" in answer[1]) == (400, True)


def test_a_method_in_small_letters_reaches_nobodys_text(server: Server) -> None:
    asked = body_of("/generate", prompt("method"))
    ask(server, "/generate", asked, TENANT + b"victim")
    for method in (b"post", b"Post"):
        asked |= {"cache_salt": "victim"}
        assert ask(server, "/generate", asked, TENANT + b"acme", method=method)[0] in (400, 405)


def test_what_asks_for_no_text_needs_no_tenant(server: Server) -> None:
    for path in ("/health", "/health_generate", "/v1/models", "/whiflash/capabilities", "/whiflash/state"):
        status, text = ask(server, path, None, method=b"GET")
        assert status == 200, (path, text)
    assert server.get("/whiflash/capabilities")["tenant_header"] is True


def test_a_call_over_grpc_is_refused(server: Server, grpc_port: int) -> None:
    """It has no headers, and could name any tenant, or itself like a health check."""
    asked = body_of("/v1/chat/completions", "one", cache_salt="victim", rid="HEALTH_CHECK_me")
    message = json.dumps(asked).encode()
    length = bytes([len(message) & 127 | 128, len(message) >> 7])
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        call = channel.unary_stream("/sglang.runtime.v1.SglangService/ChatComplete")
        try:
            answer = b"".join(call(b"\x0a" + length + message, wait_for_ready=True))
        except grpc.RpcError as error:
            answer = str(error).encode()
    assert b"X-WhiFlash-Tenant" in answer


def test_the_check_by_repetition_names_its_tenants(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AT_ONCE": 1, "LENGTH": 24, "DRAFTS": 2}.items():
        monkeypatch.setattr(echo, name, value)
    done = CliRunner().invoke(app, ["check", "--echo", server.url])
    assert done.exit_code == 0, done.output

"""Hints below the client: what `http_client` adds and takes out is what `wrap` does, for whoever takes one."""

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio.to_thread
import openai
import pytest
from fake_server import CAPABILITIES, EXPECTED, FULL, ROUTE, ROUTES, TRACE, FakeServer
from openai import AsyncOpenAI, OpenAI

import whiflash_sdk
from whiflash_sdk import HintError, Hints, UnsupportedServerWarning, agent, collect, predict, routing, spans, wrap

anthropic: Any = pytest.importorskip("anthropic")
httpx: Any = sys.modules.get("httpx") or sys.modules["httpx2"]
"""The library of the client that is installed: OpenAI's newest brings HTTPX 2 alone."""
httpx2: Any = sys.modules.get("httpx2", httpx)

ASKED: Any = {"model": "m", "messages": [{"role": "user", "content": "Wo?  é"}]}
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
streaming: Any = sys.modules["whiflash_sdk.streaming"]
collecting: Any = sys.modules["whiflash_sdk.collecting"]
WAYS = ["wrap", "http_client"]


@pytest.fixture(autouse=True)
def _reads_everything(server: FakeServer) -> None:
    server.capabilities = {**CAPABILITIES, "routes": ROUTES}


def hinting(way: str, server: FakeServer, library: Any = OpenAI, **settings: Any) -> Any:
    """A client that sends hints, in one of the two ways."""
    url = server.base_url if library is OpenAI else server.url
    told: dict[str, Any] = {"base_url": url, "api_key": "key"}
    if way == "wrap":
        return wrap(library(**told), **settings)
    inner = None if library is OpenAI else httpx2.Client()
    return library(**told, http_client=whiflash_sdk.http_client(inner, **settings))


def talk(client: OpenAI) -> Iterator[Any]:
    """Every kind of request and block that changes what goes out."""
    create = client.chat.completions.create
    yield create(**ASKED, tools=[TOOL])
    yield create(**ASKED, extra_body=Hints(agent="own", off=True).extra_body({"cache_salt": None}))
    yield create(**ASKED, extra_body={"custom_params": {"a": 1}, "cache_salt": "own"})
    with agent("planner"), predict("text"), spans.json():
        yield create(**ASKED)
        yield client.completions.create(model="m", prompt="x")
        yield client.responses.create(model="m", input="x")
    stream = create(**ASKED, stream=True)
    assert all(chunk.choices for chunk in stream)
    yield stream


def test_both_ways_send_and_read_the_same(server: FakeServer) -> None:
    found = []
    for way in WAYS:
        server.bodies.clear()
        with hinting(way, server, agent="client", tenant="acme") as client, collect() as collected:
            told = [routing(answer) for answer in talk(client)]
        assert told == [EXPECTED] * 7
        traces = [(one.agent, one.model, one.tools, one.response_id) for one in collected.traces]
        found.append((list(server.bodies), traces))
    assert found[0] == found[1]
    assert found[0][1][0] == ("client", "m", ("f",), "r0")
    assert [body["cache_salt"] for body in server.bodies].count("acme") == 6
    assert server.paths.count(ROUTE) == 2  # once for each way: their headers differ


@pytest.mark.parametrize("zipped", [False, True])
def test_a_stream_loses_its_trace_chunk_and_nothing_else(server: FakeServer, zipped: bool) -> None:
    server.zipped, server.usage_chunk, server.trace = zipped, True, FULL
    asked = {**ASKED, "stream": True, "custom_params": Hints(trace="full").custom_params()}
    with httpx.Client() as plain, whiflash_sdk.http_client() as client, collect() as collected:
        url = f"{server.base_url}/chat/completions"
        sent = plain.post(url, json=asked).text.split("\n\n")
        with client.stream("POST", url, json=asked) as answer:
            passed = "".join(answer.iter_text()).split("\n\n")
    assert passed == [event for event in sent if "sglext" not in event]
    assert len(passed) == len(sent) - 1
    (trace,) = collected.traces
    assert trace.text == "".join(json.loads(e[6:])["choices"][0]["delta"].get("content", "") for e in passed[:2])


def test_events_cut_anywhere_are_whole_again() -> None:
    events = b'data: {"id":"r","model":"m","choices":[{"index":0}]}\r\n\r\n: comment\r\n\r\n'
    trace = b'data: {"choices":[],"sglext":{"whiflash":%s}}\r\n\r\n' % json.dumps(TRACE).encode()
    for size in (1, 2, 3, 7, 4096):
        call = collecting.CollectedCall(None)
        passing = streaming.Passing(call, whole_text=False)
        whole = events + trace + b"data: [DONE]\r\n\r\nrest"
        parts = [passing.feed(whole[at : at + size]) for at in range(0, len(whole), size)]
        assert b"".join(parts) + passing.end() == events + b"data: [DONE]\r\n\r\nrest"
        assert call.raw_traces == [TRACE]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["Text/Event-Stream; charset=utf-8", "application/json", "", "text/plain"])
def test_a_stream_is_one_whatever_its_content_type_says(server: FakeServer, way: str, kind: str) -> None:
    server.stream_kind = kind
    with hinting(way, server) as client:
        stream = client.chat.completions.create(**ASKED, stream=True)
        assert [chunk.choices[0].index for chunk in stream] == [0, 0, 0]
    assert routing(stream) == EXPECTED


@pytest.mark.parametrize("choices", [5, [{"index": [], "delta": {"content": 1}}], [None], {"a": 1}])
def test_an_answer_of_other_types_passes(choices: Any) -> None:
    event = b'data: {"id":"r","choices":%s,"sglext":5}\n\n' % json.dumps(choices).encode()
    for text in (event, event[6:], b"data: " + b"[" * 3_000 + b"\n\n"):
        passing = streaming.Passing(collecting.CollectedCall(None), whole_text=True)
        assert passing.feed(text[:9]) + passing.feed(text[9:]) + passing.end() == text


def test_what_a_request_is_sent_as(server: FakeServer) -> None:
    """Text that is not ours is escaped as it was, and a chunked request has no length beside it."""
    sent: list[Any] = []
    inner = httpx.Client(event_hooks={"request": [sent.append]})
    body = b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}],"x":1.0e1}'
    with whiflash_sdk.http_client(inner, tenant="acme") as client:
        answer = client.post(f"{server.base_url}/chat/completions", content=iter([body[:9], body[9:]]))
    assert answer.is_success
    assert sent[-1].content.endswith(body[1:])
    assert "transfer-encoding" not in sent[-1].headers
    assert server.bodies[-1]["cache_salt"] == "acme"


@pytest.mark.parametrize("said", [{"agent": "a"}, "{", "[1]", "5", '{"agent":5}', "[" * 3_000, 7])
@pytest.mark.parametrize("routes", [True, False])
def test_hints_that_are_none_are_left_for_the_server(server: FakeServer, said: Any, routes: bool) -> None:
    own = {"custom_params": {"whiflash": said, "a": 1}}
    with hinting("http_client", server, capabilities=None if routes else False, tenant="acme") as client:
        client.chat.completions.create(**ASKED, extra_body=own)
    assert server.bodies[0] == {**ASKED, **({**own, "cache_salt": "acme"} if routes else {"custom_params": {"a": 1}})}
    if routes:
        raises = pytest.raises((HintError, openai.APIConnectionError))
        with hinting("http_client", server, strict=True) as client, raises:
            client.with_options(max_retries=0).chat.completions.create(**ASKED, extra_body=own)
        assert len(server.bodies) == 1
    else:  # a value that is not ours stays
        for way in WAYS:
            with hinting(way, server, capabilities=False) as client:
                client.responses.create(model="m", input="x", extra_body=own)
            assert server.bodies[-1] == {"model": "m", "input": "x", **own}


def test_a_server_is_asked_once_whatever_cookies_it_sets(server: FakeServer) -> None:
    """And in a coding that is read, whatever the request asks for."""
    server.sets_cookies = True
    headers = {"accept-encoding": "br, x-own", "x-name": "é".encode()}
    with whiflash_sdk.http_client(httpx.Client(headers=headers)) as http:
        client = OpenAI(base_url=server.base_url, api_key="key", http_client=http)
        for _ in range(3):
            client.chat.completions.create(**ASKED)
    assert server.paths.count(ROUTE) == 1
    assert all("custom_params" in body for body in server.bodies)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_refusal_is_read_as_if_nobody_had_read_it(server: FakeServer, zipped: bool) -> None:
    server.refuses, server.refusal, server.zipped = {"messages"}, (422, "the prompt is too long"), zipped
    asked: Any = {"url": f"{server.base_url}/chat/completions", "json": ASKED}

    async def main() -> Any:
        async with whiflash_sdk.async_http_client() as http, http.stream("POST", **asked) as answer:
            return b"".join([part async for part in answer.aiter_raw()]), answer.headers

    with whiflash_sdk.http_client() as http, http.stream("POST", **asked) as answer:
        found = b"".join(answer.iter_raw()), answer.headers
    with httpx.Client() as http, http.stream("POST", **asked) as answer:
        expected = b"".join(answer.iter_raw()), answer.headers
    asynchronous = asyncio.run(main())
    for raw, headers in (found, asynchronous):
        assert raw == expected[0]
        for name in ("content-encoding", "content-length", "content-type"):
            assert headers.get(name) == expected[1].get(name)
    with hinting("http_client", server) as client, pytest.raises(openai.UnprocessableEntityError, match="too long"):
        client.chat.completions.create(**ASKED)


def test_a_repetition_that_fails_says_nothing_of_the_server(server: FakeServer) -> None:
    """And an answer that is a failure is no answer to watch."""
    server.refuses = {"custom_params", "messages"}
    with hinting("http_client", server) as client:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(**ASKED)
        server.refuses = set()
        client.chat.completions.create(**ASKED)
        server.failures = 1
        with collect(client._client) as collected, pytest.raises(openai.InternalServerError) as failed:
            client.with_options(max_retries=0).chat.completions.create(**ASKED)
    assert ["custom_params" in body for body in server.bodies] == [True, False, True, True]
    assert not collected.traces
    for error in (raised.value, failed.value):
        assert sys.modules["whiflash_sdk.trace"].CALL not in error.response.extensions


def test_a_hook_of_the_inner_client_raises_what_it_raises(server: FakeServer) -> None:
    """Its answer was not read, and reading it for our fields would raise something else."""

    def hook(response: Any) -> None:
        if response.request.method == "POST":
            response.raise_for_status()

    server.refuses = {"messages"}
    with (
        whiflash_sdk.http_client(httpx.Client(event_hooks={"response": [hook]})) as client,
        pytest.raises(httpx.HTTPStatusError),
    ):
        client.post(f"{server.base_url}/chat/completions", json=ASKED)


def test_a_server_that_does_not_route_gets_the_request_byte_for_byte(server: FakeServer) -> None:
    server.capabilities_status = 404
    sent: list[bytes] = []
    inner = httpx.Client(event_hooks={"request": [lambda request: sent.append(request.content)]})
    body = b'{ "model":"m", "messages" : [], "x": 1.0e1, "y": "\\ud800" }'
    with whiflash_sdk.http_client(inner) as client:
        with pytest.warns(UnsupportedServerWarning, match="404"):
            client.post(f"{server.url}/acme%2Fteam/v1/completions", content=body)
        client.post(f"{server.base_url}/embeddings", content=body)
    assert sent[-2:] == [body, body]
    assert server.paths[0] == f"/acme%2Fteam{ROUTE}"


def test_strict_is_the_cause_of_the_librarys_error(server: FakeServer) -> None:
    server.capabilities_status = 404
    with (
        hinting("http_client", server, strict=True) as client,
        pytest.raises((openai.APIConnectionError, whiflash_sdk.UnsupportedServerError)) as raised,
    ):
        client.with_options(max_retries=0).chat.completions.create(**ASKED)
    error = raised.value
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error  # newer clients' is bare
    assert isinstance(cause, whiflash_sdk.UnsupportedServerError)


def test_settings_of_the_inner_client_hold(server: FakeServer) -> None:
    inner = httpx.Client(headers={"x-mine": "1"}, timeout=77, base_url=server.base_url)
    with whiflash_sdk.http_client(inner) as client:
        assert client.timeout == httpx.Timeout(77)
        client.post("completions", json={"model": "m", "prompt": "x"})
    assert inner.is_closed
    assert server.headers[0]["x-mine"] == "1"
    with pytest.raises(TypeError, match="httpx2"):
        whiflash_sdk.http_client(OpenAI(api_key="x"))  # type: ignore[type-var]


def test_a_block_of_one_http_client_sees_its_calls_alone(server: FakeServer) -> None:
    http = whiflash_sdk.http_client()
    mine = OpenAI(base_url=server.base_url, api_key="key", http_client=http)
    with collect(http) as collected, hinting("http_client", server) as other:
        mine.chat.completions.create(**ASKED)
        other.chat.completions.create(**ASKED)
    assert len(collected.traces) == 1


def test_asynchronous_clients_do_the_same(server: FakeServer) -> None:
    async def main() -> list[Any]:
        http = whiflash_sdk.async_http_client(agent="a")
        client = AsyncOpenAI(base_url=server.base_url, api_key="key", http_client=http)
        with collect() as collected:
            answers = await asyncio.gather(*(client.chat.completions.create(**ASKED) for _ in range(3)))
            stream = await client.chat.completions.create(**ASKED, stream=True)
            assert [chunk.choices[0].index async for chunk in stream] == [0, 0, 0]
            server.refuses = {"custom_params"}
            with pytest.warns(UnsupportedServerWarning, match="custom_params"):
                await client.chat.completions.create(**ASKED)
        await client.close()
        return [*map(routing, answers), routing(stream), *(trace.arms for trace in collected.traces)]

    assert asyncio.run(main()) == [EXPECTED] * 4 + [EXPECTED.arms] * 4
    assert server.paths.count(ROUTE) == 1
    assert server.wire(0) == {"agent": "a", "trace": True}


def test_the_rest_of_a_body_stays_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, repeated keys and escapes. Long bodies are read beside the event loop."""
    transport: Any = sys.modules["whiflash_sdk.transport"]
    read, in_loop, sent = transport._read, list[bool](), list[bytes]()

    def noted(content: bytes) -> Any:
        in_loop.append(threading.current_thread() is threading.main_thread())
        return read(content)

    def answer(request: Any) -> Any:
        sent.append(request.content)
        return httpx2.Response(200, json={})

    monkeypatch.setattr(transport, "_read", noted)
    exact = b'{"model":"m","n":1.0,"x":"\\u00e9","x":1e2,"messages":[%s]}'
    bodies = [exact % rest for rest in (b"", b" " * transport.BRIEF)]

    async def main() -> None:
        inner = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))
        client = whiflash_sdk.async_http_client(inner, tenant="acme", capabilities=True)
        async with anyio.to_thread.current_default_thread_limiter():  # an application may use all that it grants
            for body in bodies:
                await client.post("http://server/v1/chat/completions", content=body)

    asyncio.run(main())
    assert in_loop == [True, False]
    for body, carried in zip(bodies, sent, strict=True):
        assert carried.endswith(body[1:])
        assert json.loads(carried)["cache_salt"] == "acme"


MESSAGE: Any = {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "Where?"}]}
CALLABLE: Any = [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]


@pytest.mark.parametrize("way", WAYS)
def test_anthropics_own_client(server: FakeServer, way: str) -> None:
    with hinting(way, server, anthropic.Anthropic, agent="coder", tenant="acme") as client, collect() as seen:
        message = client.messages.create(**MESSAGE, tools=CALLABLE)
        with predict("x = 1"), client.messages.stream(**MESSAGE) as stream:
            assert stream.get_final_text() == server.content
        events = client.messages.create(**MESSAGE, stream=True, tools=CALLABLE)
        kinds = [event.type for event in events]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert [routing(answer) for answer in (message, stream, stream.get_final_message(), events)] == [EXPECTED] * 4
    assert [(one.agent, one.tools, one.response_id, one.model) for one in seen.traces] == [
        ("coder", tools, "r0", "tiny") for tools in (("f",), (), ("f",))
    ]
    assert [server.wire(index) for index in range(3)] == [{"agent": "coder", "trace": True}] * 3
    assert {body["cache_salt"] for body in server.bodies} == {"acme"}
    assert server.bodies[1]["prediction"] == {"type": "content", "content": "x = 1"}
    assert server.paths.count(ROUTE) == 1


def test_anthropics_asynchronous_client(server: FakeServer) -> None:
    async def ask(make: Callable[[], Any]) -> Any:
        async with make() as client:
            message = await client.messages.create(**MESSAGE)
            stream = await client.messages.create(**MESSAGE, stream=True)
            assert [event.type async for event in stream][-1] == "message_stop"
        return routing(message), routing(stream)

    told: dict[str, Any] = {"base_url": server.url, "api_key": "key"}
    for make in (
        lambda: wrap(anthropic.AsyncAnthropic(**told)),
        lambda: anthropic.AsyncAnthropic(**told, http_client=whiflash_sdk.async_http_client(httpx2.AsyncClient())),
    ):
        assert asyncio.run(ask(make)) == (EXPECTED, EXPECTED)


def test_routes_that_a_server_does_not_read_go_out_as_they_are(server: FakeServer) -> None:
    server.capabilities = dict(CAPABILITIES)
    with hinting("wrap", server, anthropic.Anthropic, tenant="acme") as client, predict("x = 1"):
        client.messages.create(**MESSAGE)
    with hinting("wrap", server, agent="a") as client, predict("x = 1"):
        client.responses.create(model="m", input="x", extra_body={"top_k": 3})
    assert server.bodies == [MESSAGE, {"model": "m", "input": "x", "top_k": 3}]

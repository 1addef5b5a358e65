"""Traces over HTTP, on real servers with a tiny model: whole for who asked, in SGLang's spans, and nothing at all for
the others.
"""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from chat_app import answering
from openai import OpenAI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from patience import wait_until
from server_host import Server, ServerHost
from sse import ASKED, MESSAGES, PROMPT, ROUTES, TOOL, ask, check, comparable
from tiny_models import SPECIAL_TOKENS, served_pair
from whiflash_sdk import routing, wrap

from whiflash_sglang.cli.top import LiveView, WatchedServer

pytestmark = pytest.mark.server

Attributes = dict[str, Any]


class Collector:
    """An OpenTelemetry collector's view: attributes of every span sent, by OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Attributes] = []
        self.url = ""

    def answer(self, path: str, headers: Any, body: bytes) -> tuple[int, bytes]:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    named = {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}
                    self.spans.append(named)
        return 200, b""

    def of(self, request: str) -> Attributes:
        """Attributes of the span that ended `request`, as soon as it is there."""
        found: list[Attributes] = wait_until(
            lambda: [span for span in self.spans if span.get("gen_ai.request.id") == request]
        )
        return found[0]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    with answering(made.answer) as made.url:
        yield made


@pytest.fixture(scope="module")
def incremental(tmp_path_factory: pytest.TempPathFactory, host: ServerHost, collector: Collector) -> Iterator[Server]:
    """Streams of increments, prompts in small chunks; SGLang's own spans, which `collector` is sent."""
    flags = "--tool-call-parser hermes --incremental-streaming-output --chunked-prefill-size 64 --enable-trace"
    arguments = [*served_pair(tmp_path_factory.mktemp("checkpoints")), *flags.split()]
    arguments += ["--otlp-traces-endpoint", f"{collector.url}/v1/traces"]
    with host.running(*arguments, env={"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}) as running:
        yield running


NATIVE: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}


def test_every_route_returns_the_trace(client: OpenAI, server: Server) -> None:
    chat = client.chat.completions.create(**ASKED, messages=MESSAGES)
    check(routing(chat), 24, chat.choices[0].message.content)
    text = client.completions.create(**ASKED, prompt=PROMPT)
    check(routing(text), 24, text.choices[0].text)
    params = {**NATIVE, "custom_params": {"whiflash": '{"trace":"full"}'}}
    native = server.post("/generate", {"text": PROMPT, "sampling_params": params})
    check(routing(native), 24, native["text"])


def test_text_that_a_parser_took_comes_with_the_trace(client: OpenAI) -> None:
    call = "so <tool_call><function=f></function></tool_call>"
    forced: Any = {"regex": re.escape(call), "tools": [TOOL]}
    body = {**ASKED["extra_body"], "ignore_eos": False, "regex": forced["regex"]}
    asked: Any = {**ASKED, "max_tokens": 100, "extra_body": body, "messages": MESSAGES, "tools": [TOOL]}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.tool_calls
    stream = client.chat.completions.create(**asked, stream=True)
    chunks = list(stream)
    assert any(chunk.choices[0].delta.tool_calls for chunk in chunks)
    for trace in (routing(answer), routing(stream)):
        assert trace is not None
        assert trace.text == call
        assert {s.span for s in trace.stretches} >= {"tool_call"}


@pytest.mark.parametrize("name", ["server", "incremental"])
def test_streams_return_the_trace(name: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(name)
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=None) as made:
        client = wrap(made, trace="full", strict=True)
        chat = client.chat.completions.create(**ASKED, messages=MESSAGES, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chat)
        assert text == client.chat.completions.create(**ASKED, messages=MESSAGES).choices[0].message.content
        check(routing(chat), 24, text)
        words = client.completions.create(**ASKED, prompt=PROMPT, stream=True)
        text = "".join(chunk.choices[0].text for chunk in words)
        check(routing(words), 24, text)
        both = client.completions.create(**ASKED, prompt=PROMPT, stream=True, n=2)
        assert sorted({chunk.choices[0].index for chunk in both}) == [0, 1]
        for choice in range(2):
            check(routing(both, choice), 24, text)


def test_special_tokens_take_no_place_in_the_text(client: OpenAI) -> None:
    """The one here ends no text and pads none; decoding leaves it out all the same."""
    unnamed = 256 + SPECIAL_TOKENS.index("<|im_end|>")
    mixed: Any = {**ASKED, "temperature": 2.0, "seed": 1, "logit_bias": {str(unnamed): 100, "0": 100}}
    response = client.chat.completions.create(**mixed, messages=MESSAGES)
    text = response.choices[0].message.content or ""
    assert 0 < len(text) < 24
    assert set(text) == {"!"}
    check(routing(response), 24, text)


@contextmanager
def traced_neighbour(server: Server) -> Iterator[None]:
    """Somebody who asks for traces has a request running as long as the block lasts."""
    ended = threading.Event()
    running = threading.Event()

    def ask_on() -> None:
        with OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=None) as made:
            wrapped = wrap(made, trace="full")
            while not ended.is_set():
                asked = {**ASKED, "max_tokens": 400, "stream": True, "messages": MESSAGES}
                with wrapped.chat.completions.create(**asked) as stream:
                    for _ in stream:
                        running.set()
                        if ended.is_set():
                            return

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask_on)
        wait_until(lambda: running.is_set() or asking.done())
        try:
            yield
        finally:
            ended.set()
            asking.result()


def plain(route: str, stream: bool, n: int) -> dict[str, Any]:
    """A request of somebody who has never heard of us."""
    if route == "/generate":
        params = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True, "n": n}
        return {"text": PROMPT, "sampling_params": params, "stream": stream}
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 40, "ignore_eos": True, "n": n, "stream": stream}
    return {**asked, "messages": MESSAGES} if "chat" in route else {**asked, "prompt": PROMPT}


@pytest.mark.parametrize(("stream", "n"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("route", ROUTES)
def test_who_did_not_ask_gets_what_a_plain_server_sends(
    server: Server, stock: Server, route: str, stream: bool, n: int
) -> None:
    body = plain(route, stream, n)
    alone = ask(server.url, route, body)
    with traced_neighbour(server):
        beside = [ask(server.url, route, body) for _ in range(3)]
    assert all("whiflash" not in sent for sent in (alone, *beside))
    assert [comparable(sent, spec=False) for sent in (alone, *beside)] == [comparable(ask(stock.url, route, body))] * 4
    assert [comparable(sent).keys() for sent in beside] == [comparable(alone).keys()] * 3


def test_top_shows_what_a_server_did(server: Server) -> None:
    with httpx.Client() as client:
        view = LiveView([WatchedServer(server.url, client)])
        wait_until(lambda: server.get("/whiflash/state")["requests"] == 0)
        view.look()
        server.generate(text=PROMPT, sampling_params={"max_new_tokens": 24})
        wait_until(lambda: server.get("/whiflash/state")["requests"] == 0)
        (found,) = view.look()
    assert found["model"] == "tiny"
    lately, total = found["now"], found["total"]
    assert lately["tokens_per_second"] * lately["seconds"] == pytest.approx(23)
    assert sum(arm["share"] for arm in lately["arms"].values()) == pytest.approx(1)
    assert sum(total["reasons"].values()) == pytest.approx(1)
    assert 1 <= lately["acceptance_length"] <= 24


def test_a_span_of_sglangs_tells_who_drafted(incremental: Server, collector: Collector) -> None:
    prompt = {"input_ids": [5, 6, 7] * 6, "sampling_params": {"temperature": 0, "max_new_tokens": 40}}
    asking = {"custom_params": {"whiflash": '{"trace":"summary","agent":"coder"}'}}
    answers = incremental.generate_all(
        [
            {**prompt, "rid": "untraced", "extra_key": "secret"},
            {**prompt, "rid": "asking", "sampling_params": {**prompt["sampling_params"], **asking}},  # type: ignore[dict-item]
        ],
        concurrency=2,
    )
    quiet, told = (answer["meta_info"] for answer in answers)
    assert "whiflash" not in quiet
    summary = told["whiflash"]
    span = collector.of("asking")
    assert (span["whiflash.policy"], span["whiflash.agent"]) == ("auto", "coder")
    assert "whiflash.tenant" not in span
    assert (span["whiflash.rounds"], span["whiflash.switches"]) == (summary["rounds"], summary["switches"])
    for arm, counts in summary["arms"].items():
        assert {name: span[f"whiflash.arm.{arm}.{name}"] for name in counts} == counts
    # A request that did not ask has a span as well, and no part of it in the answer.
    other = collector.of("untraced")
    assert len(other["whiflash.tenant"]) == 16
    assert "secret" not in str(other)
    arms = {key.split(".")[2] for key in other if key.startswith("whiflash.arm.")}
    assert sum(other[f"whiflash.arm.{arm}.tokens"] for arm in arms) == quiet["completion_tokens"] - 1

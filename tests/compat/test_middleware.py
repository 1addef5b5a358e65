"""Fields of ours in requests and answers of SGLang's routes: one middleware, tried on routes of a stand-in."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import ORJSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.srt.utils.auth import AuthLevel, auth_level

from whiflash_sglang.copying.groups import SIBLINGS
from whiflash_sglang.http import cut_streams, middleware, reader, writer
from whiflash_sglang.http.callers import CALLER, Caller
from whiflash_sglang.http.reader import CURRENT, Call, Fields, Form, as_chat, implied
from whiflash_sglang.spans.hints import TOOLS_KEY, HintError, parse_hints

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FULL = {"whiflash": '{"trace":"full"}'}
ROUTES: dict[str, Form] = {
    "/v1/chat/completions": "chat",
    "/invocations": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}


def manager(*, trusts: bool = False, **more: Any) -> Any:
    """SGLang's manager of a server of ours."""
    enabled, longest = SimpleNamespace(enabled=True), SimpleNamespace(prediction_tokens=9)
    samples = SimpleNamespace(directory=None)
    settings = SimpleNamespace(structure=enabled, lookup=longest, force_recorded=False, samples=samples)
    settings.trust_tenant_header = trusts
    return SimpleNamespace(
        config_value=lambda name: "hermes" if name == "tool_call_parser" else None,
        server_args=SimpleNamespace(
            _whiflash=settings, api_key="user", admin_api_key="boss", **{"enable_session_radix_cache": False, **more}
        ),
        model_config=SimpleNamespace(vocab_size=8),
        tokenizer=SimpleNamespace(encode=lambda text, **_: [ord(character) % 8 for character in text]),
        server_status=None,
    )


def tools_of(form: Form, *names: str) -> list[dict[str, Any]]:
    if form == "messages":
        return [{"name": name, "input_schema": SCHEMA} for name in names]
    if form == "responses":
        return [{"type": "function", "name": name, "parameters": SCHEMA} for name in names]
    return [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in names]


CHOICES: dict[Form, dict[str, Any]] = {
    "chat": {
        "none": "none",
        "required": "required",
        "f": {"type": "function", "function": {"name": "f"}},
        "g": {"type": "function", "function": {"name": "g"}},
    },
    "responses": {
        "none": "none",
        "required": "required",
        "f": {"type": "function", "name": "f"},
        "g": {"type": "function", "function": {"name": "g"}},
    },
    "messages": {
        "none": {"type": "none"},
        "required": {"type": "any"},
        "f": {"type": "tool", "name": "f"},
        "g": {"type": "tool", "name": "g"},
    },
}
FORMATS: dict[Form, dict[str, Any]] = {
    "chat": {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    "responses": {"text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}},
    "messages": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
}
BUILT_IN: dict[Form, dict[str, Any]] = {
    "responses": {"type": "web_search"},
    "messages": {"type": "bash_20250124", "input_schema": {}},
}


def implied_by(form: Form, **body: Any) -> tuple[list[tuple[str, bool]], str | None]:
    """Spans by kind, and whether they are open; and what is carried of the tools."""
    params = implied(manager(), as_chat(Call(form, body)), Fields()) or {}
    return [(span.kind, span.open) for span in parse_hints(params).spans], params.get(TOOLS_KEY)


@pytest.mark.parametrize("form", CHOICES)
def test_tools_and_formats_imply_spans_and_calls(form: Form) -> None:
    fences = [("json", False), ("code", False)]
    assert implied_by(form) == (fences, None)
    spans, tools = implied_by(form, tools=tools_of(form, "f", "g"))
    assert spans == [("tool_call", False), *fences]
    assert '"f"' in str(tools)
    assert '"g"' in str(tools)
    one, choices = tools_of(form, "f"), CHOICES[form]
    assert implied_by(form, tools=one, tool_choice=choices["none"]) == (fences, None)
    assert implied_by(form, tools=one, tool_choice=choices["required"])[0] == [("tool_call", True)]
    assert implied_by(form, **FORMATS[form])[0] == [("json", True)]
    if form in BUILT_IN:
        assert implied_by(form, tools=[BUILT_IN[form]]) == (fences, None)
    if form == "responses":  # SGLang calls its own tools itself, and gives a tool of free text one argument
        built_in = implied_by(form, tools=[BUILT_IN[form]], tool_choice="required")
        assert built_in == (fences, None)
        assert '"input"' in str(implied_by(form, tools=[{"type": "custom", "name": "f"}])[1])


def test_auto_is_what_sglang_found() -> None:
    """As the parsers' names, `auto` in the server's arguments has become what the template shows."""
    ours, found = manager(), {"tool_call_parser": "qwen3_coder", "reasoning_parser": "qwen3"}
    ours.config_value = found.get
    params = implied(ours, as_chat(Call("chat", {"tools": tools_of("chat", "f")})), Fields())
    assert {span.begin for span in parse_hints(params).spans} >= {"<think>", "<tool_call>"}


@pytest.mark.parametrize(("continues", "kinds"), [(True, ["code"]), (False, [])])
def test_an_answer_that_the_request_begins_is_followed(continues: bool, kinds: list[str]) -> None:
    """Without the flag SGLang makes a last assistant message the user's."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "```python\nprint("}]
    spans, _ = implied_by("chat", messages=messages, continue_final_message=continues)
    assert [kind for kind, is_open in spans if is_open] == kinds


@pytest.mark.parametrize("named", ["f", "g"])
@pytest.mark.parametrize("form", CHOICES)
def test_a_named_tool_is_the_only_one_that_is_carried(form: Form, named: str) -> None:
    spans, tools = implied_by(form, tools=tools_of(form, "f", "g"), tool_choice=CHOICES[form][named])
    assert spans == [("tool_call", True)]
    assert [name for name in ("f", "g") if f'"{name}"' in str(tools)] == [named]


def test_an_internal_request_gets_hints_and_salts() -> None:
    sglangs = {"__sglang_reasoning_in_grammar": True}
    obj = SimpleNamespace(sampling_params={"custom_params": sglangs}, cache_salt=None, extra_key=None)
    hints = {"whiflash": '{"infer":false}'}
    call = Call("messages", {}, asyncio.run(reader.fields_of(manager(), hints)), {"cache_salt": "acme"})
    assert asyncio.run(reader.take_up(manager(), obj, call)) == [call.fields]
    assert obj.sampling_params == {"custom_params": {**sglangs, **hints}}
    assert (obj.cache_salt, obj.extra_key) == ("acme", None)


class Serving(OpenAIServingBase):
    def __init__(self) -> None: ...

    def _request_id_prefix(self) -> str:
        return ""

    def _convert_to_internal_request(self, *_: Any) -> Any: ...


class App:
    """An application whose routes answer what `answer` says, behind the middleware. seen: bodies and calls."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, answer: Any = lambda _: {"answer": 1}, ours: Any = None
    ) -> None:
        self.seen: list[tuple[Any, Call | None]] = []
        self.app = FastAPI()
        self.app.state.openai_serving_chat = Serving()
        self.app.state.openai_serving_responses = OpenAIServingResponses.__new__(OpenAIServingResponses)
        self.app.state.anthropic_serving = AnthropicServing.__new__(AnthropicServing)
        state = SimpleNamespace(tokenizer_manager=ours or manager())
        monkeypatch.setattr(http_server, "_global_state", state)
        monkeypatch.setattr(http_server, "app", self.app)
        middleware.install()
        middleware.install()

        async def route(request: Request) -> Any:
            call = CURRENT.get()
            self.seen.append((await request.body(), call))
            return answer(call)

        for path in (*ROUTES, "/generate", "/v1/embeddings", *middleware.OLLAMA):
            self.app.post(path)(route)
        self.app.get("/server_info")(route)

        @auth_level(AuthLevel.ADMIN_OPTIONAL)
        async def flush() -> None: ...

        self.app.post("/flush_cache")(flush)
        self.client = TestClient(self.app)


@pytest.mark.parametrize("path", ROUTES)
def test_a_route_gets_its_body_and_its_call(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    app = App(monkeypatch)
    body = json.dumps({"custom_params": FULL, "prediction": {"type": "content", "content": "abc"}})
    assert app.client.post(path, content=body).json() == {"answer": 1}
    assert app.client.post(path, content=b"[1").json() == {"answer": 1}, "SGLang refuses it"
    assert app.client.post(path, content=b"[1]").json() == {"answer": 1}
    (first, call), (second, nothing), _ = app.seen
    assert (first.decode(), second) == (body, b"[1")
    assert call is not None
    assert nothing is not None
    assert call.fields is not None
    assert (call.form, call.fields.hints.trace, call.fields.prediction) == (ROUTES[path], "full", [1, 2, 3])
    assert (nothing.body, nothing.fields) == ({}, None)
    assert CURRENT.get() is None
    more = f'{body[:-1]}, "temperature": NaN, "user": "\\ud800"}}'.encode()
    for sent in (body.encode("utf-8-sig"), body.encode("utf-16"), more):  # SGLang reads these, too
        app.client.post(path, content=sent)
        raw, call = app.seen[-1]
        assert (raw, call and call.fields and call.fields.prediction) == (sent, [1, 2, 3])
    answer = app.client.post(path, content=b"[" * 1500 + b"]" * 1500)
    assert (answer.status_code, "body: JSON nests deeper" in answer.text) == (400, True)


def test_other_routes_and_servers_without_us_have_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(monkeypatch)
    earlier = CURRENT.set(Call("chat"))  # a connection's last request; the next one has its context
    app.client.post("/v1/embeddings", json={"custom_params": 7})
    CURRENT.reset(earlier)
    app.client.post("/generate", json={"custom_params": 7})
    (_, other), (_, native) = app.seen
    assert other is None
    assert native == Call("native")
    stock = SimpleNamespace(server_args=SimpleNamespace())
    app = App(monkeypatch, ours=stock)
    assert app.client.post("/v1/completions", json={"custom_params": 7}).status_code == 200
    assert [call for _, call in app.seen] == [None]


def predicted(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"prediction": {"type": "content", "content": [*parts]}}


def formatted(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "schema": schema}}


MALFORMED: list[tuple[dict[str, Any], str, str]] = [
    ({"custom_params": 7}, "custom_params", "must be an object"),
    ({"response_format": [7]}, "response_format", "must be an object"),
    (formatted("x"), "response_format.schema", "must be an object"),
    (formatted({"properties": 5}), "response_format.schema.properties", "must be an object"),
    (formatted({"properties": {"strict": True}}), "response_format.schema.properties.strict", "must be an object"),
    ({"custom_params": {"whiflash": '{"off":1}'}}, "custom_params.whiflash.off", "must be true or false"),
    ({"custom_params": {"whiflash_inferred": "x"}}, "custom_params.whiflash_inferred", "must be true"),
    ({"prediction": {"type": "diff"}}, "prediction.type", "must be content"),
    ({"prediction": "text"}, "prediction", "must be an object"),
    ({"prediction": {"type": "content"}}, "prediction.content", "must be a string or a list"),
    (predicted({"type": "text", "text": "a"}, {"type": "image_url"}), "prediction.content[1].type", ""),
    (predicted({"type": "text", "text": 3}), "prediction.content[0].text", ""),
    ({"custom_params": {"whiflash_forced": [1]}}, "custom_params.whiflash_forced", "without --whiflash"),
    ({"custom_params": {TOOLS_KEY: "[]"}}, f"custom_params.{TOOLS_KEY}", "by the server only"),
]


@pytest.mark.parametrize("path", ROUTES)
def test_a_malformed_field_is_a_400_in_the_routes_form(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Every field on one route, and one field on every route: all read their bodies by the same function."""
    app = App(monkeypatch)
    for body, field, why in MALFORMED if path == "/v1/chat/completions" else MALFORMED[:1]:
        answer = app.client.post(path, json=body)
        error = answer.json()
        assert (answer.status_code, app.seen) == (400, [])
        if ROUTES[path] in ("messages", "responses"):
            error = error["error"]
            assert error["type"] == "invalid_request_error"
        if ROUTES[path] != "messages":
            assert (error["param"], error["code"]) == (field, 400)
        assert error["message"].startswith(field)
        assert why in error["message"]
    for schema in (None, {}, {"properties": {"strict": None}}, {"properties": {"strict": {"default": True}}}):
        assert app.client.post(path, json=formatted(schema)).status_code == 200


def test_a_salt_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(monkeypatch)
    answer = app.client.post("/v1/messages", json={"cache_salt": ["a"]})
    assert answer.json()["error"]["message"] == "cache_salt: must be text"
    assert app.client.post("/v1/messages", json={"extra_key": "k"}).status_code == 200
    assert app.seen[0][1] is not None
    assert app.seen[0][1].keys == {"extra_key": "k"}


@pytest.mark.parametrize("path", [*ROUTES, "/generate", *middleware.OLLAMA])
def test_a_tenants_header_that_nobody_trusts_is_refused(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """So a gateway that names tenants to a server that ignores them is noticed at its first request."""
    client = App(monkeypatch).client
    for name, value, refused in (
        ("x-whiflash-agent", "ä" * 64, None),
        ("x-whiflash-agent", "ä" * 65, "X-WhiFlash-Agent: has 65 characters"),
        ("X-WhiFlash-Tenant", "acme", "X-WhiFlash-Tenant: is not trusted"),
    ):
        answer = client.post(path, json={}, headers=[(name.encode(), value.encode())])
        assert answer.status_code == (400 if refused else 200)
        assert refused is None or refused in answer.text


def test_a_health_check_is_known_by_its_route_not_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    app, callers = App(monkeypatch, ours=manager(trusts=True)), list[Caller]()
    app.app.get("/health")(lambda: callers.append(CALLER.get()))
    assert app.client.get("/health").status_code == 200
    obj = SimpleNamespace(sampling_params={}, rid="HEALTH_CHECK_1")
    for caller in (*callers, Caller(tenant="acme")):
        CALLER.set(caller)
        asyncio.run(reader.take_up(manager(trusts=True), obj, None))
    CALLER.set(Caller())
    with pytest.raises(HintError, match="is missing"):
        asyncio.run(reader.take_up(manager(trusts=True), obj, None))


def test_a_headers_agent_is_the_hint_of_a_request_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(monkeypatch)
    bodies: list[Any] = [{}, {"custom_params": FULL}, {"custom_params": {"whiflash": '{"agent":"own"}'}}]
    for body in bodies:
        for path in ROUTES:
            app.client.post(path, json=body, headers={"X-WhiFlash-Agent": "coder"})
    app.client.post("/v1/completions", json={})
    found = [call.fields for _, call in app.seen if call is not None and call.fields is not None]
    assert [one.hints.agent for one in found] == [*["coder"] * 10, *["own"] * 5, None]
    assert [parse_hints(one.params) for one in found] == [one.hints for one in found]
    assert {one.hints.trace for one in found[5:10]} == {"full"}
    native = SimpleNamespace(sampling_params=[{"custom_params": FULL}, {}], rid=["HEALTH_CHECK_1", "b"])
    token = CALLER.set(Caller(agent="coder"))
    assert [one.hints.agent for one in asyncio.run(reader.take_up(manager(), native, None))] == ["coder"] * 2
    CALLER.reset(token)
    assert [parse_hints(one["custom_params"]).agent for one in native.sampling_params] == ["coder"] * 2


def test_answers_to_one_prompt_are_a_group_of_their_own() -> None:
    """Unless they name a task. No other request has the group's name."""
    named = {"custom_params": {"whiflash": '{"task":"t","agent":"a"}'}}
    given = [{"n": 1}, {}, {"n": 2}, {"n": 2}, {"n": 2, **named}, named]
    native = SimpleNamespace(sampling_params=given, rid=list("abcdef"))
    asyncio.run(reader.take_up(manager(), native, None))
    tasks = [parse_hints(one.get("custom_params")).task for one in native.sampling_params]
    assert [task and task[: len(SIBLINGS)] for task in tasks] == [None, None, SIBLINGS, SIBLINGS, "t", "t"]
    assert tasks[2] != tasks[3]


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({}, False),
        ({"origin": "http://testserver"}, False),
        ({"origin": "http://testserver:3000"}, True),
        ({"origin": "null"}, True),
        ({"sec-fetch-site": "cross-site"}, True),
        ({"sec-fetch-site": "none"}, False),  # by its address bar
        ({"sec-fetch-site": "same-origin", "origin": "https://testserver"}, False),
    ],
)
def test_a_page_of_another_origin_steers_no_server_without_keys(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], foreign: bool
) -> None:
    """It may ask for answers. With keys it has to know one."""
    ours = manager()
    app = App(monkeypatch, ours=ours)
    assert app.client.post("/flush_cache", headers=headers).status_code == 200
    ours.server_args.api_key = ours.server_args.admin_api_key = None
    assert app.client.post("/flush_cache", headers=headers).status_code == (403 if foreign else 200)
    assert app.client.post("/generate", json={}, headers=headers).status_code == 200


def test_who_leaves_in_the_middle_of_a_body_is_gone_for_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    async def run() -> None:
        parts = [
            {"type": "http.request", "body": b"{", "more_body": True},
            {"type": "http.disconnect"},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Any:
            return parts.pop(0)

        monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=manager()))
        scope = {"type": "http", "method": "POST", "path": "/x/v1/completions", "root_path": "/x"}
        await middleware.HintsMiddleware(app)(scope, receive, receive)

    asyncio.run(run())
    assert seen == [{"type": "http.disconnect"}] * 2


@pytest.mark.parametrize(
    ("form", "body", "parsers", "cuts"),
    [
        (None, {}, {}, "tokens"),  # Ollama's, and over gRPC
        ("native", {}, {}, None),
        ("completion", {"logprobs": 2}, {}, None),
        ("responses", {}, {}, "marks"),
        ("responses", {}, {"use_harmony": True}, "tokens"),
        ("chat", {}, {}, None),
        ("chat", {"logprobs": True}, {"reasoning_parser": "qwen3"}, "tokens"),
        ("chat", {}, {"reasoning_parser": "qwen3"}, "marks"),
        ("chat", {"separate_reasoning": False}, {"reasoning_parser": "qwen3"}, None),
        ("messages", {"separate_reasoning": False}, {"reasoning_parser": "qwen3"}, "marks"),
        ("chat", {}, {"tool_call_parser": "hermes"}, None),
        ("chat", {"tools": tools_of("chat", "f")}, {"tool_call_parser": "hermes"}, "marks"),
        ("chat", {"tools": tools_of("chat", "f"), "tool_choice": "none"}, {"tool_call_parser": "hermes"}, None),
        ("chat", {"messages": [{"tools": tools_of("chat", "f")}]}, {"tool_call_parser": "hermes"}, "marks"),
        ("messages", {"tools": tools_of("messages", "f")}, {"tool_call_parser": "hermes"}, "marks"),
    ],
)
def test_a_stream_is_cut_for_who_does_not_only_add_it_up(
    monkeypatch: pytest.MonkeyPatch, form: Form | None, body: Any, parsers: Any, cuts: Any
) -> None:
    chat = OpenAIServingChat.__new__(OpenAIServingChat)
    chat.tool_call_parser = chat.reasoning_parser = chat._encoding_adapter = None
    chat.use_harmony = False
    vars(chat).update(parsers)
    for serving in ("openai_serving_chat", "openai_serving_responses"):
        monkeypatch.setattr(http_server.app.state, serving, chat, raising=False)
    call = None if form is None else Call(form, body)
    for stream in (True, False):
        obj = SimpleNamespace(stream=stream)
        assert cut_streams.cuts_of(manager(), obj, call) == (cuts if stream else None)
    assert cut_streams.cuts_of(SimpleNamespace(tokenizer=None), SimpleNamespace(stream=True), call) is None


TRACE: dict[str, Any] = {"choice": 0, "rounds": 3, "stretches": []}
COUNTS = {"accepted_prediction_tokens": 2, "rejected_prediction_tokens": 1}
USAGE = {"prompt_tokens": 1, "reasoning_tokens": 0, "completion_tokens_details": None}
SPEC = {
    "spec_verify_ct": 4,
    "spec_num_correct_drafts": 6,
    "spec_correct_drafts_histogram": [1, 3],
    "spec_accept_rate": 0.5,
    "spec_num_proposed_drafts": 12,
}


def ended(call: Call | None, text: str = "Köln", choice: int = 0) -> None:
    """Leave the traces and counts of `generate_request` on a call."""
    assert call is not None
    call.traces.append(({**TRACE, "choice": choice}, text))
    call.counts[choice] = dict(COUNTS)


def test_a_chats_answer_has_trace_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(call: Call | None) -> Any:
        ended(call, choice=1)
        ended(call, "other")
        choices = [{"index": i, "message": {"content": "Köln"}} for i in range(2)]
        return ORJSONResponse({"choices": choices, "usage": dict(USAGE), "sglext": None})

    found = App(monkeypatch, answer).client.post("/v1/chat/completions", json={"custom_params": FULL})
    assert int(found.headers["content-length"]) == len(found.content)
    body = found.json()
    assert body["sglext"]["whiflash"] == [{**TRACE, "text": "other"}, {**TRACE, "choice": 1}]
    assert body["usage"]["completion_tokens_details"] == {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": 4,
        "rejected_prediction_tokens": 2,
    }


def test_what_asked_for_nothing_is_sent_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = b'{ "choices" : [] , "n": 1e3}'
    app = App(monkeypatch, lambda _: StreamingResponse(iter([sent[:5], sent[5:]]), media_type="application/json"))
    for body in ({}, {"custom_params": FULL}):
        assert app.client.post("/v1/completions", json=body).content == sent


def event(name: str, **data: Any) -> str:
    text = json.dumps({"type": name, **data}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n"


def chunk(**data: Any) -> str:
    return f"data: {json.dumps({'model': 'm', **data}, ensure_ascii=False, separators=(',', ':'))}\n\n"


STREAMS: dict[str, list[str]] = {
    "/v1/chat/completions": [
        chunk(choices=[{"index": 0, "delta": {"content": "Kö"}}]),
        chunk(choices=[{"index": 0, "delta": {"content": "ln"}}], usage={**USAGE}),
        chunk(choices=[], sglext={"spec_tokens_details": SPEC}),
        "event: sglext_ids\n" + chunk(choices=[], sglext={"input_ids": [1]}),
        chunk(choices=[], usage={**USAGE}),
        "data: [DONE]\n\n",
    ],
    "/v1/completions": [
        chunk(choices=[{"index": 0, "text": "Köln"}]),
        chunk(choices=[], usage={**USAGE}),
        "data: [DONE]\n\n",
    ],
    "/v1/messages": [
        event("message_start", message={}),
        event("content_block_delta", delta={"text": "Köln"}),
        event("message_delta", usage={}),
        event("message_stop"),
    ],
    "/v1/responses": [
        event("response.created", response={}),
        event("response.output_text.delta", delta="Köln"),
        event("response.incomplete", response={"id": "r"}),
    ],
}


async def sent(path: str, body: dict[str, Any], parts: list[bytes], text: str = "Köln") -> list[bytes]:
    """Bodies that a client gets of a stream that a route sends in these parts."""
    form = ROUTES[path]
    call = Call(form, body, await reader.fields_of(manager(), body.get("custom_params")))
    found: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            found.append(message["body"])

    out = writer.extending(call, send)
    await out({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    ended(call, text)
    for part in parts:
        await out({"type": "http.response.body", "body": part, "more_body": True})
    await out({"type": "http.response.body", "body": b"", "more_body": False})
    return found


@pytest.fixture(autouse=True)
def widest(monkeypatch: pytest.MonkeyPatch) -> None:
    from whiflash_sglang.engine.scheduler import figures

    monkeypatch.setattr(figures, "get_spec", lambda: SimpleNamespace(speculative_num_draft_tokens=4))


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_is_the_same_however_it_is_cut(path: str) -> None:
    """SGLang sends an event a part; what a server or another plugin joins or cuts must not matter."""
    whole = "".join(STREAMS[path]).encode()
    body = {"custom_params": FULL, "return_spec_tokens_details": True}
    expected = b"".join(asyncio.run(sent(path, body, [part.encode() for part in STREAMS[path]])))
    assert expected != whole
    for at in range(len(whole)):
        assert b"".join(asyncio.run(sent(path, body, [whole[:at], whole[at:]]))) == expected
    assert b"".join(asyncio.run(sent(path, {}, [whole]))) == whole


def test_events_pass_as_they_come() -> None:
    parts = [part.encode() for part in STREAMS["/v1/chat/completions"]]
    found = asyncio.run(sent("/v1/chat/completions", {"custom_params": FULL}, parts))
    assert found[:2] == parts[:2]
    assert len(found) == len(parts) + 1
    assert found[-2].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(("text", "shown"), [("Köln", False), ("<think>Köln", True)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_completions_stream_ends_with_its_trace(path: str, text: str, shown: bool) -> None:
    parts = [part.encode() for part in STREAMS[path]]
    lines = b"".join(asyncio.run(sent(path, {"custom_params": FULL}, parts, text))).decode().split("\n")
    *_, usage, trace = (json.loads(line[6:]) for line in lines if line.startswith("data: {"))
    assert usage["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0, **COUNTS}
    assert (trace["id"], trace["model"], trace["choices"]) == ("whiflash-trace", "m", [])
    assert trace["sglext"]["whiflash"] == ({**TRACE, "text": text} if shown else TRACE)


def test_an_error_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: Call | None) -> Any:
        ended(call)
        return ORJSONResponse({"message": "no"}, status_code=400)

    app = App(monkeypatch, refuse)
    assert app.client.post("/v1/completions", json={"custom_params": FULL}).json() == {"message": "no"}


def test_a_stream_whose_route_fails_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> AsyncIterator[str]:
        yield STREAMS["/v1/completions"][0]
        raise RuntimeError("broken")

    app = App(monkeypatch, lambda _: StreamingResponse(broken(), media_type="text/event-stream"))
    with pytest.raises(RuntimeError, match="broken"):
        app.client.post("/v1/completions", json={"custom_params": FULL})
    assert CURRENT.get() is None


def test_another_algorithms_figures_stay() -> None:
    from whiflash_sglang.engine.scheduler import figures

    answer = {"spec_num_proposed_drafts": 7, "spec_accept_rate": 0.5}
    manager = SimpleNamespace(server_args=SimpleNamespace())
    figures._of_an_answer(lambda *_: None, manager, answer, None, 0)
    assert answer == {"spec_num_proposed_drafts": 7, "spec_accept_rate": 0.5}

"""Hints and predictions over HTTP, on a real server with a tiny model: they steer, are counted, and leave the text."""

import ast
import asyncio
import json
import re
from pathlib import Path
from typing import Any, Literal

import grpc
import httpx
import pytest
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, set_tracing_disabled
from blocks import pages, python_blocks
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from server_host import Server
from sse import ASKED, MESSAGES, PROMPT, ROUTES, TOOL, check
from whiflash_sdk import Hints, Span, Trace, capabilities, collect, http_client, routing, wrap
from whiflash_sdk import predict as predicting
from whiflash_sdk.adapters.openai_agents import wrap_model

pytestmark = pytest.mark.server

README = Path(__file__).resolve().parents[2] / "README.md"


def test_chats_over_grpc_are_served_without_hints(server: Server, grpc_port: int) -> None:
    """The listener hands a body on without the fields that SGLang does not know; the text is that of HTTP."""
    body = {key: value for key, value in ASKED.items() if key != "extra_body"}
    body |= {"messages": MESSAGES, "ignore_eos": True, "whiflash": {"tenant": 3}}
    message = json.dumps(body).encode()
    length = bytes([len(message) & 127 | 128, len(message) >> 7])
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        call = channel.unary_stream("/sglang.runtime.v1.SglangService/ChatComplete")
        answer = b"".join(call(b"\x0a" + length + message, wait_for_ready=True)).decode(errors="replace")
    over_http = server.post("/v1/chat/completions", {key: body[key] for key in body if key != "whiflash"})
    content = over_http["choices"][0]["message"]["content"]
    assert json.dumps(content) in answer


def test_capabilities_name_the_parser(client: OpenAI) -> None:
    found = capabilities(client)
    assert found is not None
    assert (found.version, found.tool_call_parser) == (1, "qwen3_coder")
    assert found.reasoning_parser is None
    assert {"ar", "diffusion", "none"} <= set(found.arms)


def test_the_readmes_example_runs_as_it_stands(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(ast.parse(code).body) == 5
    names: dict[str, Any] = {"messages": MESSAGES, "tools": [TOOL]}
    exec(code.replace("http://127.0.0.1:30000", server.url).replace("smollm2-135m-instruct", "tiny"), names)
    trace = routing(names["answer"])
    assert trace is not None
    assert capsys.readouterr().out.strip() == str(trace)
    assert trace.rounds > 0


@pytest.mark.parametrize(
    "page",
    [page for page in pages() if any(block.mark == "server" for block in python_blocks(page))],
    ids=lambda page: page.stem,
)
def test_the_documentations_blocks_run_as_they_stand(
    server: Server, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks(page):
        code = block.body.replace("http://127.0.0.1:30000", server.url)
        exec(code.replace("smollm2-135m-instruct", "tiny"), names)
        answer = names.get("answer") or names["response"]
        trace = routing(answer)
        assert trace is not None
        assert trace.rounds > 0
    if page.stem == "tutorial":
        assert (tmp_path / "answer.html").read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("arm", ["ar", "diffusion", "none"])
def test_hints_steer_drafting_and_leave_the_text(client: OpenAI, arm: Any) -> None:
    plain = client.completions.create(**ASKED, prompt=PROMPT)
    pinned = Hints(spans=(Span(kind="prose", open=True, prefer=arm, pin=True),), trace="full")
    body = {**ASKED["extra_body"], **pinned.extra_body()}
    steered = client.completions.create(**{**ASKED, "extra_body": body}, prompt=PROMPT)
    assert steered.choices[0].text == plain.choices[0].text
    trace = check(routing(steered), 24)
    steered_part = trace.stretches
    if arm != "none" and steered_part[-1].arm == "none":
        assert steered_part[-1].tokens == 1  # the last token a request may commit needs no draft
        steered_part = steered_part[:-1]
    assert {(s.arm, s.reason, s.span) for s in steered_part} == {(arm, "pin", "prose")}


def test_kv_hints_pass_and_change_nothing(server: Server) -> None:
    """As the page of the SDK says: `/generate` checks them, `/v1` routes drop them."""
    action = {"action_id": "a", "action_type": "kv.retain", "action_version": "1.0"}
    hints = {"kv_hints": {"protocol_version": "0.1", "message_id": "m", "actions": [action]}}
    sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    asked: dict[str, Any] = {"text": PROMPT, "sampling_params": sampling}
    assert server.post("/generate", asked | hints)["text"] == server.post("/generate", asked)["text"]
    wrong = asked | {"kv_hints": {"actions": []}}
    assert httpx.post(server.url + "/generate", json=wrong, timeout=None).status_code == 400
    server.post("/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "kv_hints": wrong})


def test_a_server_alone_gets_hints_under_any_name(client: OpenAI) -> None:
    """SGLang answers to any, and `/v1/models` says that there is no other model."""
    for model in ("default", "Tiny", "tiny"):
        assert routing(client.completions.create(**{**ASKED, "model": model}, prompt=PROMPT)) is not None


def test_tools_open_the_spans_of_the_parser_that_auto_found(server: Server) -> None:
    """Asked without the SDK, which derives spans itself."""
    call = "so <tool_call><function=f></function></tool_call>"
    asked = {"model": "tiny", "max_tokens": 100, "temperature": 0, "messages": MESSAGES, "tools": [TOOL]}
    traced = {"regex": re.escape(call), "custom_params": {"whiflash": '{"trace": "full"}'}}
    trace = routing(server.post("/v1/chat/completions", {**asked, **traced}))
    assert trace is not None
    assert "tool_call" in {stretch.span for stretch in trace.stretches}


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages"])
def test_tools_that_nest_too_deep_are_a_400_as_they_are_without_us(server: Server, route: str) -> None:
    """Written as text: the client's own writer of JSON refuses them."""
    answers = []
    for levels in range(400, 481, 16):
        schema = '{"type": "object", "properties": {"a": ' * levels + "{}" + "}}" * levels
        function = f'{{"name": "f", "{"parameters" if "chat" in route else "input_schema"}": {schema}}}'
        tool = f'{{"type": "function", "function": {function}}}' if "chat" in route else function
        asked = json.dumps({"model": "tiny", "max_tokens": 1, "messages": MESSAGES, "tools": []})
        content = asked.replace('"tools": []', f'"tools": [{tool}]')
        headers = {"content-type": "application/json"}
        answers.append(httpx.post(server.url + route, content=content, headers=headers, timeout=None))
    assert {answer.status_code for answer in answers} == {400}, answers[-1].text


SURROGATES = ["\U0001f600", "\ud83d", "\ude00\ud83d"]
"""An emoji, which JSON writes as two escapes, and halves of one."""


@pytest.mark.parametrize("text", SURROGATES, ids=["emoji", "half", "halves"])
@pytest.mark.parametrize("where", ["tool result", "tool", "schema", "prediction"])
def test_no_text_of_a_request_ends_an_arm_for_everybody(server: Server, text: str, where: str) -> None:
    said = json.dumps({"found": [f"{text} a file\n{text}", "another file of many words\n" * 8]})
    arguments: dict[str, Any] = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    if where in ("tool", "schema"):
        arguments["properties"]["name"]["enum"] = [f"{text}", "a"]
    tool = {"type": "function", "function": {"name": "find", "parameters": arguments}}
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": said if where == "tool result" else PROMPT}]}
    if where in ("schema", "tool result"):  # in JSON, what was read is copied in the form that JSON needs
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": arguments}}
    else:
        body["tools"] = [tool]
    if where == "prediction":
        body["prediction"] = predict(said + text)
    # httpx would refuse a lone surrogate, which JSON can write.
    sent, headers = json.dumps(body), {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=sent, headers=headers, timeout=None)
    assert answer.status_code in (200, 400), answer.text
    state = httpx.get(f"{server.url}/whiflash/state", timeout=None).json()
    assert (state["quarantined"], set(state["left_out"].values())) == ({}, {0})


def predict(text: object) -> dict[str, Any]:
    return {"type": "content", "content": text}


LETTERS = "[a-z]{40}"
"""Letters only: the tiny target's own text has characters of several tokens."""


def asked_of(route: str, predicted: object, **more: Any) -> dict[str, Any]:
    """A request for 24 letters, a token each, with a predicted text, where the route has its place for one."""
    if route == "/generate":
        params = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True, "regex": LETTERS}
        return {
            "text": PROMPT,
            "sampling_params": {**params, "custom_params": {"whiflash_prediction": predicted}},
            **more,
        }
    asked = {"model": "tiny", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "regex": LETTERS, **more}
    shown: dict[str, Any] = {"messages": MESSAGES} if "chat" in route else {"prompt": PROMPT}
    return {**asked, **shown, **({} if predicted is None else {"prediction": predict(predicted)})}


def post(server: Server, route: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + route, json=body, timeout=None)


def answer_of(route: str, body: Any) -> tuple[str, dict[str, int]]:
    """Text, and what of the prediction appeared."""
    if route == "/generate":
        return body["text"], {k: v for k, v in body["meta_info"].items() if k.endswith("prediction_tokens")}
    choice = body["choices"][0]
    text = choice["message"]["content"] if "chat" in route else choice["text"]
    return text, body["usage"]["completion_tokens_details"] or {}


@pytest.mark.parametrize("route", ROUTES)
def test_a_prediction_leaves_the_text_and_is_counted(server: Server, route: str) -> None:
    """Parts of a prediction are one text, and the counts of choices are summed."""
    plain, counts = answer_of(route, post(server, route, asked_of(route, None)).json())
    assert counts == {}
    assert len(plain) == 24
    for predicted, accepted in ((plain, 24), (plain[:10], 10), (plain + "~" * 9, 24), ("~" * 9, 0), ("", 0)):
        text, counts = answer_of(route, post(server, route, asked_of(route, predicted)).json())
        assert text == plain
        assert counts["accepted_prediction_tokens"] == accepted
        assert counts["rejected_prediction_tokens"] == len(predicted) - accepted
    if "chat" in route:
        parts = [{"type": "text", "text": part} for part in (plain[:7], plain[7:] + "~")]
        found = post(server, route, {**asked_of(route, None, n=2), "prediction": predict(parts)}).json()
        assert [choice["message"]["content"] for choice in found["choices"]] == [plain, plain]
        counts = {"accepted_prediction_tokens": 48, "rejected_prediction_tokens": 2}
        assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0, **counts}


def test_choices_of_several_prompts_have_their_own_predictions(server: Server) -> None:
    """SGLang numbers choices prompt by prompt: 0 and 1 are the first prompt's."""
    plain, _ = answer_of("/generate", post(server, "/generate", asked_of("/generate", None)).json())
    given = [asked_of("/generate", predicted)["sampling_params"] for predicted in (plain, "~" * 24)]
    for params in given:
        params["n"] = 2
    answers = post(server, "/generate", {"text": [PROMPT, PROMPT], "sampling_params": given}).json()
    assert [answer["text"] for answer in answers] == [plain] * 4
    accepted = [answer["meta_info"]["accepted_prediction_tokens"] for answer in answers]
    assert accepted == [24, 24, 0, 0]


@pytest.mark.parametrize("route", ROUTES[:2])
def test_a_stream_ends_with_what_appeared(server: Server, client: OpenAI, route: str) -> None:
    plain, _ = answer_of(route, post(server, route, asked_of(route, None)).json())
    asked = asked_of(route, plain + "~~", stream=True, stream_options={"include_usage": True})
    asked["extra_body"] = {name: asked.pop(name) for name in ("ignore_eos", "regex")}
    if "chat" in route:
        chunks: list[Any] = list(client.chat.completions.create(**asked))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    else:
        asked["extra_body"]["prediction"] = asked.pop("prediction")
        chunks = list(client.completions.create(**asked))
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == plain
    (usage,) = [chunk.usage for chunk in chunks if chunk.usage]
    assert usage.completion_tokens_details.accepted_prediction_tokens == 24
    assert usage.completion_tokens_details.rejected_prediction_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_with_a_long_prediction_works_and_its_trace_says_what_was_read(client: OpenAI, stream: bool) -> None:
    with predicting("def f(): pass\n" * 6_000), collect() as collected:
        answers: list[Any] = [
            client.chat.completions.create(**ASKED, messages=MESSAGES, stream=stream),
            client.completions.create(**ASKED, prompt=PROMPT, stream=stream),
            client.responses.create(model="tiny", input=PROMPT, max_output_tokens=24, stream=stream),
        ]
        for answer in answers:
            assert not stream or list(answer)
    note = "the prediction was cut to its first 16384 tokens (lookup.prediction_tokens of the bundle)"
    for answer in (*answers, None):
        trace = routing(answer) if answer is not None else collected.traces[-1]
        assert trace is not None
        assert trace.notes == (note,)
        assert note in str(trace)
    with predicting("def f(): pass\n"):
        found = routing(client.completions.create(**ASKED, prompt=PROMPT))
    assert found is not None
    assert found.notes == ()


def converted(route: str, **more: Any) -> dict[str, Any]:
    """A request for 24 tokens on a route that SGLang converts."""
    if route == "/v1/messages":
        return {"model": "tiny", "max_tokens": 24, "temperature": 0, "messages": MESSAGES, **more}
    return {"model": "tiny", "max_output_tokens": 24, "temperature": 0, "input": PROMPT, **more}


def told(route: str, answer: httpx.Response, stream: bool) -> tuple[str, dict[str, Any]]:
    """Text and extension of a converted answer."""
    if not stream:
        body = answer.json()
        parts = body["content"] if route == "/v1/messages" else body["output"][0]["content"]
        return parts[0]["text"], body.get("sglext", {})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    deltas = [event.get("delta") for event in events]
    parts = [delta.get("text", "") if isinstance(delta, dict) else delta or "" for delta in deltas]
    (found,) = [
        event if route == "/v1/messages" else event["response"]
        for event in events
        if event["type"] in ("message_delta", "response.completed", "response.incomplete")
    ]
    return "".join(parts), found.get("sglext", {})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages"])
def test_a_converted_answer_tells_who_wrote_it_and_what_of_its_prediction_appeared(
    server: Server, route: str, stream: bool
) -> None:
    """In `sglext`, and what asked for neither is what SGLang sends without us. Hints steer its rounds."""
    pinned = Hints(spans=(Span(kind="prose", open=True, prefer="diffusion", pin=True),), trace="full")
    plain, nothing = told(route, post(server, route, converted(route, stream=stream)), stream)
    assert nothing == {}
    asked = {**pinned.extra_body(), "prediction": predict(plain)}
    text, extension = told(route, post(server, route, converted(route, stream=stream, **asked)), stream)
    assert text == plain
    for wrong in (plain[:9] + "~", "~"):
        partly = converted(route, stream=stream, prediction=predict(wrong))
        assert told(route, post(server, route, partly), stream)[0] == plain
    trace, counts = extension["whiflash"], extension["prediction"]
    assert trace["text"] == plain
    assert "diffusion" in trace["arms"]
    assert "pin" in trace["reasons"]
    tokens = sum(arm["tokens"] for arm in trace["arms"].values())
    assert 10 < tokens < 24
    assert trace["stretches"][-1]["chars"][1] == len(plain)
    assert counts["accepted_prediction_tokens"] > 10
    read = routing({"sglext": extension})
    assert isinstance(read, Trace)
    assert read.tokens == tokens
    undrafted = converted(route, stream=stream, **Hints(off=True, trace=True).extra_body())
    text, alone = told(route, post(server, route, undrafted), stream)
    assert (text, alone.keys()) == (plain, {"whiflash"})
    assert alone["whiflash"]["arms"].keys() == {"none"}


class Choice(BaseModel):
    """An answer that ends by itself: the Agents SDK and `responses.stream` take no other."""

    chosen: Literal["a", "b"]


def test_anthropics_client_gets_hints_and_traces_in_both_ways(server: Server) -> None:
    """The text is the plain client's."""
    anthropic, httpx2 = pytest.importorskip("anthropic"), pytest.importorskip("httpx2")
    told: dict[str, Any] = {"base_url": server.url, "api_key": "none"}
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 24, "messages": MESSAGES}
    asked["extra_body"] = {"temperature": 0}
    plain = anthropic.Anthropic(**told).messages.create(**asked).content[0].text
    below = http_client(httpx2.Client(), tenant="acme", agent="coder")
    for client in (
        wrap(anthropic.Anthropic(**told), tenant="acme", agent="coder"),
        anthropic.Anthropic(**told, http_client=below),
    ):
        with collect() as collected, client.messages.stream(**asked) as stream:
            answers = [client.messages.create(**asked), stream.get_final_message()]
        assert [answer.content[0].text for answer in answers] == [plain] * 2
        assert all(found is not None and found.rounds > 0 for found in map(routing, answers))
        assert {trace.agent for trace in collected.traces} == {"coder"}
        assert len(collected.traces) == 2


def test_the_agents_sdks_default_route_is_collected(server: Server) -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=None) as mine:
            model = wrap_model(OpenAIResponsesModel("tiny", mine), strict=True)
            settings = ModelSettings(temperature=0, max_tokens=64)
            agent = Agent[None](name="A", model=model, model_settings=settings, output_type=Choice)
            with collect() as collected:
                await Runner.run(agent, PROMPT)
                streamed = Runner.run_streamed(agent, PROMPT)
                async for _ in streamed.stream_events():
                    pass
            assert [trace.rounds > 0 for trace in collected.traces] == [True, True]

    set_tracing_disabled(True)
    asyncio.run(run())

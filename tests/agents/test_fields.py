"""No field of any route ends the server, whatever is in it: a table made of SGLang's own models of requests, asked on
one server with all that fields may turn on, while a neighbour streams.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import pytest
from adapters import LINEARS, make_adapter
from matrix import chosen
from model_set import Models
from server_host import Server, ServerHost
from sglang.api.v1.api_types import GenerateRequest
from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.entrypoints.openai import protocol
from sglang.srt.managers import io_struct
from sglang.srt.sampling.sampling_params import SamplingParams

from whiflash_sglang.http import admission

pytestmark = pytest.mark.server

PROMPT = "one two three four one two three four one two"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2}
NATIVE: dict[str, Any] = {"text": PROMPT, "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
WRONG = (["one"], [None], [[1]], {"a": 1}, "x", -1, 2**70, True, 1e400)
"""Types and numbers; few fields take more than two of them."""
DAILY = ([None], -1, 2**70)
"""Values that may pass a model of SGLang's and end what is behind it."""
ALONE = httpx.Limits(max_keepalive_connections=0)
"""A connection each: SGLang closes one after a 500."""
MODELS: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("/generate", io_struct.GenerateReqInput, NATIVE),
    ("/v1/completions", protocol.CompletionRequest, {"model": "tiny", "prompt": PROMPT, "max_tokens": 2}),
    ("/v1/chat/completions", protocol.ChatCompletionRequest, CHAT),
    ("/v1/responses", protocol.ResponsesRequest, {"model": "tiny", "input": PROMPT, "max_output_tokens": 2}),
    ("/v1/messages", AnthropicMessagesRequest, CHAT),
    ("/v1/embeddings", protocol.EmbeddingRequest, {"model": "tiny", "input": PROMPT}),
    ("/v1/score", protocol.ScoringRequest, {"query": "a", "items": ["b"], "label_token_ids": [1]}),
    ("/v1/rerank", protocol.V1RerankReqInput, {"query": "a", "documents": ["b"]}),
    ("/v1/tokenize", protocol.TokenizeRequest, {"model": "tiny", "prompt": PROMPT}),
    ("/v1/detokenize", protocol.DetokenizeRequest, {"model": "tiny", "tokens": [1, 2]}),
    ("/encode", io_struct.EmbeddingReqInput, {"text": PROMPT}),
    ("/open_session", io_struct.OpenSessionReqInput, {"capacity_of_str_len": 1000}),
    ("/close_session", io_struct.CloseSessionReqInput, {"session_id": "nobody's"}),
)


COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
FATAL: list[tuple[str, dict[str, Any], str]] = [
    ("/generate", {"input_ids": [[1, 2], [3, -1]]}, "input_ids"),
    ("/generate", {"text": "", "session_params": {"id": None}}, "text"),
    ("/generate", {**NATIVE, "custom_labels": {"x": "y"}}, "custom_labels"),
    ("/v1/completions", {**COMPLETION, "prompt": ["a", ""]}, "empty"),
    ("/v1/completions", {**COMPLETION, "stop_token_ids": [-1], "min_tokens": 2}, "stop_token_ids"),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 321}, "top_logprobs"),
    ("/v1/score", {"model": "tiny", "query": [1], "items": [[320]], "label_token_ids": [1]}, "input_ids"),
]
"""Requests that end a plain server of SGLang 0.5.23: route, body, and the field that ours names. 320 is no token."""


def names(model: Any) -> tuple[str, ...]:
    if dataclasses.is_dataclass(model):
        return tuple(field.name for field in dataclasses.fields(model))
    return tuple(getattr(model, "__struct_fields__", None) or model.model_fields)


def table(wrong: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Route, body, and the field of it that is wrong."""
    yield from FATAL
    # Served, as ids of no token.
    yield "/v1/completions", {**COMPLETION, "stop_token_ids": [2**63]}, "stop_token_ids"
    for route, model, body in MODELS:
        yield from ((route, {**body, name: value}, name) for name in names(model) for value in wrong)
    for name in names(SamplingParams):
        for value in wrong:
            sampled = {**NATIVE["sampling_params"], name: value}
            yield "/generate", {**NATIVE, "sampling_params": sampled}, name
            given = {"instances": [{"text": PROMPT}], "parameters": {"sampling_params": sampled}}
            yield "/vertex_generate", given, name
    for name in names(io_struct.SessionParams):
        yield from (("/generate", {**NATIVE, "session_params": {name: value}}, name) for value in wrong)


SENT = {*names(io_struct.TokenizedGenerateReqInput)} & {*names(io_struct.GenerateReqInput)} - {"input_ids", "rid"}
"""Fields of `/generate` that the scheduler reads one of; a list passes SGLang's models."""


@pytest.fixture(scope="module")
def server(models: Models, tmp_path_factory: pytest.TempPathFactory, host: ServerHost) -> Iterator[Server]:
    adapter = make_adapter(models, tmp_path_factory.mktemp("adapters"), "one", seed=1, rank=4)
    given = ["--model-path", str(models.target), "--served-model-name", "tiny", "--dtype", "float32"]
    given += ["--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", str(models.dflash)]
    given += ["--whiflash-eagle-draft", str(models.eagle3), "--lora-paths", f"one={adapter.path}"]
    given += ["--max-lora-rank", "8", "--lora-target-modules", *LINEARS, "--max-loras-per-batch", "3"]
    given += ["--enable-custom-logit-processor", "--return-hidden-states-mode", "full"]
    given += ["--enable-priority-scheduling", "--enable-streaming-session", "--enable-metrics"]
    with host.running(*given) as running:
        yield running


def streamed(server: Server, until: Event) -> list[str]:
    """A neighbour's answers, one after the other."""
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 200, "ignore_eos": True}
    texts = []
    while not texts or not until.is_set():
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=None) as s:
            events = [line.removeprefix("data: ") for line in s.iter_lines() if line.startswith("data: {")]
        texts.append("".join(json.loads(event)["choices"][0]["text"] for event in events))
    return texts


def test_no_value_of_any_field_ends_the_server(server: Server, pytestconfig: pytest.Config) -> None:
    over, wrong = Event(), []
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=None, limits=ALONE) as client:
        neighbour = pool.submit(streamed, server, over)
        try:
            for route, body, name in table(chosen(pytestconfig, WRONG, *DAILY)):
                headers = {"content-type": "application/json"}
                answer = client.post(route, content=json.dumps(body), headers=headers)
                one = route == "/generate" and name in SENT and body.get(name) == [None]
                fatal = one or (route, body, name) in FATAL
                named = answer.status_code == 400 and name in answer.text
                if answer.status_code >= 500 or (fatal and not named):
                    wrong.append((route, name, body.get(name, body), answer.text[:200]))
        finally:
            over.set()
        assert len(set(neighbour.result())) == 1
    assert wrong == []


def test_turns_of_a_session_are_replaced(server: Server) -> None:
    """Whether a request names the turn or none, also beside two turns of one id."""
    session = server.post("/open_session", {"capacity_of_str_len": 1000})

    def turn(name: str, **more: Any) -> None:
        server.post("/generate", {**NATIVE, "rid": name, "session_params": {"id": session, **more}})

    turn("a")
    turn("b", replace=True)
    turn("c", rid="b")
    turn("c", rid="b")
    turn("d", rid="b", replace=True)


def test_every_field_is_a_clients_or_the_servers() -> None:
    """A new field of SGLang's is nobody's until somebody has looked at it."""
    known = {*names(GenerateRequest), *names(protocol.ChatCompletionRequest), *names(protocol.CompletionRequest)}
    known |= {*Engine.async_generate.__annotations__, *admission.INTERNAL}
    served = {"input_embeds", "log_metrics", "no_logs", "return_entropy", "return_flat_raw_top_logprobs"}
    served |= {"image_max_dynamic_patch", "return_indexer_topk", "video_max_dynamic_patch"}
    assert {*names(io_struct.GenerateReqInput)} - known == served

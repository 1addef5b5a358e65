"""Streams of every route: what a drafting server sends adds up to plain decoding's, in text, calls, records and counts,
also if SGLang's parsers read it, and if rounds commit whole blocks."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from random import Random
from typing import Any

import httpx
import pytest
from matrix import sampled
from server_host import Server, ServerHost
from tiny_models import scripted_target, tiny_dflash

pytestmark = pytest.mark.server

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
FUNCTION = {"name": "get_weather", "description": "Looks.", "parameters": PARAMETERS}
ASKED = (("Köln 東京", 3), ("São Paulo", 14))
CALLS = [json.dumps({"name": "get_weather", "arguments": {"city": c, "days": d}}) for c, d in ASKED]
HERMES = "".join(f"<tool_call>\n{call}\n</tool_call>\n" for call in CALLS)
ANSWERS = {
    "hermes": f"I look – gleich. {HERMES}Both were asked, até já.",
    "qwen25": f"I look – gleich. {HERMES}Both were asked, até já.",
    "llama3": "I look – gleich. <|python_tag|>" + ";".join(CALLS).replace("arguments", "parameters"),
    "glm45": "I look – gleich. "
    + "".join(
        f"<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{city}</arg_value>\n"
        f"<arg_key>days</arg_key>\n<arg_value>{days}</arg_value>\n</tool_call>\n"
        for city, days in ASKED
    )
    + "Both were asked, até já.",
}
"""Texts by parser: prose, two calls, and prose after them if the format has such."""
REASONING = "Let me think: Köln?\n</think>\n"
QUESTION = [{"role": "user", "content": "one two three four"}]
CHAT = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 700, "stream": True}
TOOLS = [{"type": "function", "function": FUNCTION}]
TEXT = "one two three four\n"
SAMPLING = {"temperature": 0, "max_new_tokens": 700}
NATIVE: dict[str, Any] = {"text": TEXT, "sampling_params": SAMPLING, "stream": True}
COMPLETION = {"model": "tiny", "prompt": TEXT, "temperature": 0, "max_tokens": 700, "stream": True}
OLLAMA = {"model": "tiny", "options": {"temperature": 0, "num_predict": 700}}
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": -1}
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/generate", NATIVE),
    "generate-logprobs": ("/generate", {**NATIVE, **LOGPROBS}),
    "vertex": (
        "/vertex_generate",
        {"instances": [{"text": TEXT}], "parameters": {"sampling_params": SAMPLING, "stream": True, **LOGPROBS}},
    ),
    "completion": ("/v1/completions", COMPLETION),
    "completion-logprobs": ("/v1/completions", {**COMPLETION, "logprobs": 2, **USAGE}),
    "completion-n": ("/v1/completions", {**COMPLETION, "n": 2, **USAGE}),
    "chat": ("/v1/chat/completions", {**CHAT, "tools": TOOLS}),
    "chat-n": ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "n": 3}),
    "chat-logprobs": ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "logprobs": True, "top_logprobs": 2, **USAGE}),
    "chat-one-text": ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "separate_reasoning": False}),
    "chat-late-reasoning": ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "stream_reasoning": False}),
    "chat-one-call": ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "parallel_tool_calls": False}),
    "chat-cut-off": ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "max_tokens": 180, **USAGE}),
    "chat-stop-in-reasoning": ("/v1/chat/completions", {**CHAT, "stop": ["zzz", "think", "Köln"], **USAGE}),
    "chat-stop-in-a-call": ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "stop": ["Paulo"], **USAGE}),
    "chat-unparsed": ("/v1/chat/completions", {**CHAT, "separate_reasoning": False, **USAGE}),
    "chat-unparsed-logprobs": (
        "/v1/chat/completions",
        {**CHAT, "separate_reasoning": False, "logprobs": True, "top_logprobs": 2, **USAGE},
    ),
    "invocations": ("/invocations", {**CHAT, "tools": TOOLS}),
    "responses": (
        "/v1/responses",
        {"model": "tiny", "input": "one two", "temperature": 0, "max_output_tokens": 700, "stream": True}
        | {"tools": [{"type": "function", **FUNCTION}]},
    ),
    "messages": (
        "/v1/messages",
        {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 700, "stream": True}
        | {"tools": [{"name": "get_weather", "input_schema": PARAMETERS}]},
    ),
    "ollama-chat": ("/api/chat", {**OLLAMA, "messages": QUESTION}),
    "ollama-chat-cut-off": (
        "/api/chat",
        {**OLLAMA, "messages": QUESTION, "options": {"temperature": 0, "num_predict": 24}},
    ),
    "ollama-generate": ("/api/generate", {**OLLAMA, "prompt": TEXT}),
    "ollama-generate-stopped": (
        "/api/generate",
        {**OLLAMA, "prompt": TEXT, "options": {"temperature": 0, "num_predict": 99, "stop": ["Köln"]}},
    ),
}


INTERVAL = 8
VARIANTS = {
    "hermes-incremental": ["--incremental-streaming-output"],
    "hermes-interval": ["--stream-interval", str(INTERVAL)],
}


OF_INTERVAL = ("generate-logprobs", "completion-n", "chat-n", "responses", "messages", "ollama-chat")
"""Whose tokens come several at a time: one of each route, as the others differ in what precedes that."""


@pytest.fixture(scope="module", params=sampled([*ANSWERS, *VARIANTS], "hermes"))
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, host: ServerHost
) -> Iterator[tuple[Server, Server, list[int]]]:
    """A plain server and a drafting one, whose every answer is the parser's, and the tokens of that."""
    root = tmp_path_factory.mktemp("checkpoints")
    parser, _, _ = request.param.partition("-")
    answer = scripted_target(root / "target", REASONING + ANSWERS[parser])
    shared = ["--model-path", str(root / "target"), "--served-model-name", "tiny", "--dtype", "float32"]
    shared += ["--tool-call-parser", parser, "--reasoning-parser", "qwen3-thinking"]
    shared += VARIANTS.get(request.param, [])
    ours = ["--speculative-algorithm", "WHIFLASH", "--whiflash-router", "random"]
    ours += ["--speculative-draft-model-path", str(tiny_dflash(root / "d", root / "target"))]
    with host.running(*shared) as plain, host.running(*shared, *ours) as drafting:
        yield plain, drafting, answer


def predictions(answer: list[int]) -> Iterator[dict[str, Any]]:
    """Hints for an answer: all of it, and parts between tokens that do not come, so that rounds commit as many."""
    yield {"whiflash_prediction": answer}
    for seed in range(3):
        rng = Random(seed)
        broken = [rng.randrange(256) if rng.random() < 0.15 else token for token in answer]
        yield {"whiflash_prediction": broken}


def hinted(route: str, body: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    """The request with hints, where the route has a place for them."""
    if route.startswith("/api/"):
        return body
    if "parameters" in body:
        return {**body, "parameters": hinted("", body["parameters"], hints)}
    if "sampling_params" in body:
        return {**body, "sampling_params": {**body["sampling_params"], "custom_params": hints}}
    return {**body, "custom_params": hints}


def events(server: Server, case: str, hints: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Data of a stream's events, in order."""
    route, body = CASES[case]
    body = hinted(route, body, hints) if hints else body
    answer = httpx.post(server.url + route, json=body, timeout=None)
    assert answer.status_code == 200, answer.text
    lines = (line.removeprefix("data: ") for line in answer.text.splitlines())
    return [json.loads(line) for line in lines if line.startswith("{")]


def summed(sent: list[dict[str, Any]]) -> dict[Any, list[Any]]:
    """A client's view of a stream: of each choice the parts in order, with their texts added up, and the records, which
    come after the texts of their output, however many tokens that has.
    """
    choices: dict[Any, list[Any]] = {}
    records: dict[Any, list[Any]] = {}
    for event in sent:
        for choice, key, text in texts(event):
            parts = choices.setdefault(choice, [])
            if key[0] == "logprobs":
                records.setdefault(choice, []).append(key)
            elif key == ("so far",):
                parts[:] = [(("text",), text)]
            elif parts and parts[-1][0] == key and None not in (parts[-1][1], text):
                parts[-1] = (key, parts[-1][1] + text)
            else:
                parts.append((key, text))
    return {choice: parts + records.get(choice, []) for choice, parts in choices.items()}


def texts(event: dict[str, Any]) -> Iterator[tuple[int, tuple[Any, ...], Any]]:
    """Pieces of text in an event with their choices and places; with None what begins or ends a part."""
    if "meta_info" in event:
        yield from native(event)
    elif "done" in event:  # Ollama's
        yield 0, ("text",), event["message"]["content"] if "message" in event else event["response"]
        if event["done"]:
            yield 0, ("end", event["done_reason"]), None
    for choice in event.get("choices", ()):
        yield from of_choice(choice)
    if event.get("choices") == []:
        counts = ("prompt_tokens", "completion_tokens", "total_tokens", "reasoning_tokens")
        yield 0, ("usage", *(event["usage"][name] for name in counts)), None
    kind = event.get("type", "")
    if kind.endswith(".delta") and isinstance(event["delta"], str):
        yield 0, (kind, event["output_index"]), event["delta"]
    elif kind == "response.output_item.added":
        yield 0, (kind, event["output_index"], event["item"]["type"], event["item"].get("name")), None
    elif kind == "response.completed":
        usage = event["response"]["usage"]
        yield 0, (kind, usage["output_tokens"], str(usage.get("output_tokens_details"))), None
    elif kind == "content_block_start":
        block = event["content_block"]
        yield 0, (kind, event["index"], block["type"], block.get("name")), None
    elif kind == "content_block_delta":
        (text,) = [value for name, value in event["delta"].items() if name != "type"]
        yield 0, (kind, event["index"], event["delta"]["type"]), text
    elif kind == "message_delta":
        yield 0, (kind, event["delta"]["stop_reason"], event["usage"]["output_tokens"]), None


def native(event: dict[str, Any]) -> Iterator[tuple[int, tuple[Any, ...], Any]]:
    """The same, of the native route: its outputs have everything so far, or with `--incremental-…` what is new."""
    meta, index = event["meta_info"], event.get("index", 0)
    ends, whole = meta["finish_reason"], meta["completion_tokens"] == len(event["output_ids"])
    yield index, ("so far" if whole else "text",), event["text"]
    if ends is not None:
        counts = ("prompt_tokens", "completion_tokens", "reasoning_tokens")
        yield index, ("end", ends, *(meta[name] for name in counts)), None
        for kind in ("output_token_logprobs", "output_top_logprobs") if whole else ():
            for entry in meta.get(kind, ()):
                found = entry if isinstance(entry[0], list) else [entry]
                yield index, (kind, tuple(token for _, token, _ in found)), None


def of_choice(choice: dict[str, Any]) -> Iterator[tuple[int, tuple[Any, ...], Any]]:
    """The same, of a choice of OpenAI's routes."""
    index, records = choice["index"], choice.get("logprobs") or {}
    if "text" in choice:
        yield index, ("text",), choice["text"]
    delta = choice.get("delta", {})
    for name in ("reasoning_content", "content"):
        if delta.get(name):
            yield index, (name,), delta[name]
    for call in delta.get("tool_calls") or ():
        if call["function"].get("name"):
            yield index, ("call", call["index"], call["function"]["name"]), None
        yield index, ("arguments", call["index"]), call["function"].get("arguments") or ""
    for entry in records.get("content") or ():
        tops = tuple(top["token"] for top in entry["top_logprobs"])
        yield index, ("logprobs", entry["token"], tops), None
    for token, tops in zip(records.get("tokens", ()), records.get("top_logprobs") or (), strict=False):
        yield index, ("logprobs", token, tuple(tops or ())), None
    if choice["finish_reason"]:
        yield index, ("end", choice["finish_reason"], choice.get("matched_stop")), None


ASKED_AGAIN = 20
"""Plain answers, one of which came token by token. A slow server brings several tokens at once, and what SGLang's
parsers make of these differs.
"""


def plainly(server: Server, case: str) -> dict[Any, list[Any]]:
    """Parts of a plain server's answer. Each of three choices is the one choice's answer: a batch would be slow."""
    if case != "chat-n":
        return summed(events(server, case))
    (only,) = summed(events(server, "chat")).values()
    return dict.fromkeys(range(3), only)


@pytest.mark.parametrize("case", CASES)
def test_deltas_add_up_to_plain_decodings(
    servers: tuple[Server, Server, list[int]], request: pytest.FixtureRequest, case: str
) -> None:
    at_once = "interval" in request.node.callspec.params["servers"]
    if at_once and case not in OF_INTERVAL and not request.config.getoption("--evidence"):
        pytest.skip("of the full matrix: make evidence")
    plain, drafting, answer = servers
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda hints: summed(events(drafting, case, hints)), predictions(answer))
    assert others == [first] * 3
    expected = next((each for _ in range(ASKED_AGAIN) if (each := plainly(plain, case)) == first), None)
    assert first == (expected or plainly(plain, case))


@pytest.mark.parametrize(("case", "tokens"), [("ollama-generate", None), ("ollama-chat-cut-off", 24)])
def test_outputs_are_as_many_as_plain_decodings(
    servers: tuple[Server, Server, list[int]], request: pytest.FixtureRequest, case: str, tokens: int | None
) -> None:
    """The first token is sent at once, then as many as `--stream-interval` says."""
    _, drafting, answer = servers
    every = INTERVAL if "interval" in request.node.callspec.params["servers"] else 1
    later = (len(answer) + 1 if tokens is None else tokens) - 1
    assert len(events(drafting, case)) == 1 + ceil(later / every)


def test_rounds_committed_several_tokens(servers: tuple[Server, Server, list[int]]) -> None:
    arms = servers[1].get("/whiflash/state")["by_arm"]
    assert arms["lookup"]["accepted"] > 2 * arms["lookup"]["rounds"] > 0

"""Streams whose calls and reasoning SGLang's parsers read: what a drafting server sends adds up to plain decoding's."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
"""By parser: prose, two calls, and prose after them where the format has such."""
REASONING = "Let me think: Köln?\n</think>\n"
QUESTION = [{"role": "user", "content": "one two three four"}]
CHAT = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 700, "stream": True}
TOOLS = [{"type": "function", "function": FUNCTION}]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat/completions", {**CHAT, "tools": TOOLS}),
    "chat-n": ("chat/completions", {**CHAT, "tools": TOOLS, "n": 3}),
    "chat-logprobs": (
        "chat/completions",
        {**CHAT, "tools": TOOLS, "logprobs": True, "top_logprobs": 2}
        | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chat-one-text": ("chat/completions", {**CHAT, "tools": TOOLS, "separate_reasoning": False}),
    "chat-late-reasoning": ("chat/completions", {**CHAT, "tools": TOOLS, "stream_reasoning": False}),
    "chat-one-call": ("chat/completions", {**CHAT, "tools": TOOLS, "parallel_tool_calls": False}),
    "chat-cut-off": ("chat/completions", {**CHAT, "tools": TOOLS, "max_tokens": 180}),
    "responses": (
        "responses",
        {"model": "tiny", "input": "one two", "temperature": 0, "max_output_tokens": 700, "stream": True}
        | {"tools": [{"type": "function", **FUNCTION}]},
    ),
    "messages": (
        "messages",
        {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 700, "stream": True}
        | {"tools": [{"name": "get_weather", "input_schema": PARAMETERS}]},
    ),
}


@pytest.fixture(scope="module", params=sampled([*ANSWERS, "hermes-incremental"], "hermes"))
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, host: ServerHost
) -> Iterator[tuple[Server, Server, list[int]]]:
    """A plain server and a drafting one, whose every answer is the parser's, and the tokens of that."""
    root = tmp_path_factory.mktemp("checkpoints")
    parser, _, increments = request.param.partition("-")
    answer = scripted_target(root / "target", REASONING + ANSWERS[parser])
    shared = ["--model-path", str(root / "target"), "--served-model-name", "tiny", "--dtype", "float32"]
    shared += ["--tool-call-parser", parser, "--reasoning-parser", "qwen3-thinking"]
    shared += ["--incremental-streaming-output"] if increments else []
    ours = ["--speculative-algorithm", "WHIFLASH", "--whiflash-router", "random"]
    ours += ["--speculative-draft-model-path", str(tiny_dflash(root / "d", root / "target"))]
    with ExitStack() as running, ThreadPoolExecutor(2) as pool:
        started = pool.map(lambda more: host.running(*shared, *more), ([], ours))
        plain, drafting = (running.enter_context(server) for server in started)
        yield plain, drafting, answer


def predictions(answer: list[int]) -> Iterator[dict[str, Any]]:
    """Hints for an answer: all of it, and parts between tokens that do not come, so that rounds commit as many."""
    yield {"custom_params": {"whiflash_prediction": answer}}
    for seed in range(3):
        rng = Random(seed)
        broken = [rng.randrange(256) if rng.random() < 0.15 else token for token in answer]
        yield {"custom_params": {"whiflash_prediction": broken}}


def events(server: Server, case: str, more: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Of a stream: the data of its events, in order."""
    route, body = CASES[case]
    answer = httpx.post(f"{server.url}/v1/{route}", json={**body, **(more or {})}, timeout=None)
    assert answer.status_code == 200, answer.text
    lines = (line.removeprefix("data: ") for line in answer.text.splitlines())
    return [json.loads(line) for line in lines if line.startswith("{")]


def summed(sent: list[dict[str, Any]]) -> dict[Any, list[Any]]:
    """What a client puts together from a stream: of each choice the parts in order, with their texts added up."""
    choices: dict[Any, list[Any]] = {}
    for event in sent:
        for choice, key, text in texts(event):
            parts = choices.setdefault(choice, [])
            if parts and parts[-1][0] == key and None not in (parts[-1][1], text):
                parts[-1] = (key, parts[-1][1] + text)
            else:
                parts.append((key, text))
    return choices


def texts(event: dict[str, Any]) -> Iterator[tuple[int, tuple[Any, ...], Any]]:
    """Pieces of text in an event with their choices and places; with None what begins or ends a part."""
    for choice in event.get("choices", ()):
        delta, index = choice["delta"], choice["index"]
        for name in ("reasoning_content", "content"):
            if delta.get(name):
                yield index, (name,), delta[name]
        for call in delta.get("tool_calls") or ():
            if call["function"].get("name"):
                yield index, ("call", call["index"], call["function"]["name"]), None
            yield index, ("arguments", call["index"]), call["function"].get("arguments") or ""
        for entry in (choice.get("logprobs") or {}).get("content") or ():
            yield (
                index,
                ("logprobs", entry["token"], tuple(top["token"] for top in entry["top_logprobs"])),
                None,
            )
        if choice["finish_reason"]:
            yield index, ("end", choice["finish_reason"]), None
    if event.get("choices") == []:
        yield 0, ("usage", event["usage"]["completion_tokens"], event["usage"]["total_tokens"]), None
    kind = event.get("type", "")
    if kind.endswith(".delta") and isinstance(event["delta"], str):
        yield 0, (kind, event["output_index"]), event["delta"]
    elif kind == "response.output_item.added":
        yield 0, (kind, event["output_index"], event["item"]["type"], event["item"].get("name")), None
    elif kind == "content_block_start":
        yield (
            0,
            (kind, event["index"], event["content_block"]["type"], event["content_block"].get("name")),
            None,
        )
    elif kind == "content_block_delta":
        (text,) = [value for name, value in event["delta"].items() if name != "type"]
        yield 0, (kind, event["index"], event["delta"]["type"]), text
    elif kind == "message_delta":
        yield 0, (kind, event["delta"]["stop_reason"], event["usage"]["output_tokens"]), None


def steady(server: Server, case: str) -> list[Any]:
    """Parts of a plain server's answer, from two streams that agree: a slow one brings several tokens at once, too."""
    before = summed(events(server, case))[0]
    while (found := summed(events(server, case))[0]) != before:
        before = found
    return found


@pytest.mark.parametrize("case", CASES)
def test_deltas_add_up_to_plain_decodings(servers: tuple[Server, Server, list[int]], case: str) -> None:
    plain, drafting, answer = servers
    expected = steady(plain, case.removesuffix("-n"))
    for hints in predictions(answer):
        choices = summed(events(drafting, case, hints))
        assert choices == dict.fromkeys(range(CASES[case][1].get("n", 1)), expected)


def test_rounds_committed_several_tokens(servers: tuple[Server, Server, list[int]]) -> None:
    arms = servers[1].get("/whiflash/state")["by_arm"]
    assert arms["lookup"]["accepted"] > 2 * arms["lookup"]["rounds"] > 0

"""Answers over HTTP are plain decoding's: a case for each route and form, all asked at once.

`tests/worker/test_plain_text.py` asks for sampling, stops and grammars, `test_parsed_streams.py` for streams.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from patience import wait_until
from server_host import Server
from sse import MESSAGES, PROMPT
from typer.testing import CliRunner

from whiflash_sglang.cli import echo
from whiflash_sglang.cli.app import app

pytestmark = pytest.mark.server

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["alpha", "beta"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
FUNCTION = {"name": "look", "description": "Looks.", "parameters": SCHEMA, "strict": True}
TOOLS = [{"type": "function", "function": FUNCTION}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}


def native(fields: Mapping[str, Any] | None = None, **sampling: Any) -> tuple[str, dict[str, Any]]:
    params = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True, **sampling}
    return "/generate", {"text": PROMPT, "sampling_params": params, **(fields or {})}


def text(**fields: Any) -> tuple[str, dict[str, Any]]:
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 40, "ignore_eos": True}
    return "/v1/completions", asked | fields


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    asked = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 48}
    return "/v1/chat/completions", asked | fields


def response(**fields: Any) -> tuple[str, dict[str, Any]]:
    asked = {"model": "tiny", "input": PROMPT, "temperature": 0, "max_output_tokens": 40}
    return "/v1/responses", asked | fields


def message(**fields: Any) -> tuple[str, dict[str, Any]]:
    asked = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
    return "/v1/messages", asked | fields


NO_BLANKS = {str(token): -100.0 for token in (197, 198, 201, 220)}
"""Tab, line feed, carriage return and space: a random model may fill an answer with them where a grammar allows it."""
COMPACT: dict[str, Any] = {"logit_bias": NO_BLANKS, "max_tokens": 160}
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0, "token_ids_logprob": [70]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": native(),
    "generate-batch": native({"text": [PROMPT, PROMPT[:20], "x"], **LOGPROBS}, n=2),
    "generate-none": native(max_new_tokens=0),
    "generate-one": native(LOGPROBS, max_new_tokens=1),
    "completion": text(n=2, logprobs=2, echo=True),
    "chat": chat(n=2, logprobs=True, top_logprobs=2),
    "chat-json-schema": chat(response_format=FORMAT, **COMPACT),
    "chat-json-object": chat(response_format={"type": "json_object"}),
    "chat-tools": chat(tools=TOOLS),
    "chat-tool": chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "look"}}, **COMPACT),
    "responses-tools": response(tools=[{"type": "function", **FUNCTION}]),
    "messages-tools": message(tools=[{"name": "look", "input_schema": SCHEMA}]),
}

OWN = re.compile(r"(^|_)id$|^created|_at$|latency|_ts$|_time$|throughput|cached_tokens|^spec_|^dp_rank$|^obfuscation$")
"""Fields that no two answers share, that count the cache, and that every speculative algorithm of SGLang adds."""


@pytest.fixture(scope="module")
def servers(pair: tuple[Server, Server]) -> Iterator[tuple[Server, Server]]:
    """Plain decoding, and the policy that takes every drafter at random."""
    pair[1].post("/whiflash/policy", {"router": "random"})
    yield pair
    pair[1].post("/whiflash/policy", {"router": "auto"})


def ask(server: Server, route: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(server.url + route, json=body, timeout=None)
    assert answer.status_code == 200, f"{route}: {answer.text}"
    return seen(answer.json())


def seen(value: Any) -> Any:
    """An answer without what is its own."""
    if isinstance(value, dict):
        return {key: seen(inner) for key, inner in value.items() if not OWN.search(key)}
    return [seen(inner) for inner in value] if isinstance(value, list) else value


def differences(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Differences of two answers; numbers may differ as sums in another order do."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            yield from differences(found.get(key), expected.get(key), f"{path}.{key}")
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            yield from differences(a, b, f"{path}[{i}]")
    elif isinstance(found, float) and isinstance(expected, float):
        if not math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-4):
            yield f"{path}: {found} instead of {expected}"
    elif found != expected:
        yield f"{path}: {found!r} instead of {expected!r}"


def answers(server: Server) -> dict[str, Any]:
    """Answers to every case, eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(CASES, pool.map(lambda case: ask(server, *case), CASES.values()), strict=True))


@pytest.fixture(scope="module")
def both(servers: tuple[Server, Server]) -> tuple[dict[str, Any], dict[str, Any]]:
    plain, drafting = map(answers, servers)
    arms = servers[1].get("/whiflash/state")["by_arm"]
    assert min(arms[arm]["accepted"] for arm in ("ar", "diffusion", "lookup", "structure")) > 0
    return plain, drafting


@pytest.mark.parametrize("name", CASES)
def test_is_plain_decodings(both: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    plain, drafting = both
    assert list(differences(drafting[name], plain[name])) == []


def test_features_do_what_they_say(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Else two servers that ignore them would agree."""
    plain, _ = both
    chosen = plain["chat-json-schema"]["choices"][0]["message"]["content"]
    (call,) = plain["chat-tool"]["choices"][0]["message"]["tool_calls"]
    for said in (chosen, call["function"]["arguments"]):
        assert json.loads(said, strict=False).keys() == {"name", "kind"}
    assert len(plain["generate-batch"]) == 6
    assert [len(plain[name]["choices"]) for name in ("completion", "chat")] == [2, 2]
    assert list(differences(plain["chat-json-schema"], plain["chat-tool"])), "the comparison sees what differs"


def test_disconnects_leave_nothing_behind(servers: tuple[Server, Server], both: Any) -> None:
    """Clients that go away in mid-answer, beside one that stays."""
    _, drafting = servers
    route, body = native({"stream": True}, max_new_tokens=400)

    def leave(after: int) -> None:
        with httpx.stream("POST", drafting.url + route, json=body, timeout=None) as stream:
            for _, _line in zip(range(after), stream.iter_lines(), strict=False):
                pass

    with ThreadPoolExecutor(8) as pool:
        left = [pool.submit(leave, 1 + 3 * i) for i in range(12)]
        stays = ask(drafting, *CASES["chat"])
        for one in left:
            one.result()
    assert list(differences(stays, both[0]["chat"])) == []
    wait_until(lambda: drafting.get("/whiflash/state")["requests"] == 0)


SOME = ("generate", "generate-batch", "completion", "chat-json-schema")


def some(server: Server) -> dict[str, Any]:
    with ThreadPoolExecutor(len(SOME)) as pool:
        return dict(zip(SOME, pool.map(lambda name: ask(server, *CASES[name]), SOME), strict=True))


def test_a_weight_update(servers: tuple[Server, Server], both: Any) -> None:
    """The target's weights are others from now on; its drafters were trained for the old ones, and text is right."""
    first = Path(servers[0].get("/model_info")["model_path"])

    def update(model: Path) -> None:
        for server in servers:
            done = server.post("/update_weights_from_disk", {"model_path": str(model)})
            assert done["success"], done

    update(first.with_name("other"))
    plain, drafting = map(some, servers)
    update(first)
    assert list(differences(drafting, plain)) == []
    assert list(differences(plain["generate"], both[0]["generate"])), "the weights are the old ones"


def test_a_wrong_token_of_one_arm_fails_the_check(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """`whiflash check --echo`: the answers of a real server, and a token that somebody changed on their way."""
    asked = echo.over_http

    def changed(client: httpx.Client, url: str, bodies: Sequence[echo.Body], **named: Any) -> Sequence[echo.Body]:
        answers = asked(client, url, bodies, **named)
        for body, answer in zip(bodies, answers, strict=True):
            if '"prefer": "diffusion"' in body["sampling_params"]["custom_params"]["whiflash"]:
                answer["output_ids"][-1] += 1
        return answers

    for name, value in {"AT_ONCE": 1, "LENGTH": 24, "DRAFTS": 2, "over_http": changed}.items():
        monkeypatch.setattr(echo, name, value)
    done = CliRunner().invoke(app, ["check", "--echo", server.url, "--json"])
    found = json.loads(done.stdout)
    assert (done.exit_code, found["right"], found["dtype"]) == (1, False, "float32")
    assert {each["asked"] for each in found["wrong"]} == {"diffusion"}
    monkeypatch.setattr(echo, "over_http", asked)
    done = CliRunner().invoke(app, ["check", "--echo", server.url])
    assert done.exit_code == 0, done.output
    assert "0 of " in done.stdout

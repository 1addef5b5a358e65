"""Two servers behind SGLang's own router: conversations stay where their prefix is, and nobody gets wrong text."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import APIError, OpenAI
from patience import wait_until
from server_host import Server, ServerHost, answers
from tensor_parallel import Checkpoints

from whiflash_sglang.server import free_port

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

LONG = 150
"""Tokens of an answer in whose middle a server can be killed."""
TRACED = {"whiflash": '{"trace":"summary"}'}


def arguments(checkpoints: Checkpoints, router: str) -> list[str]:
    return [
        *("--model-path", str(checkpoints.target), "--dtype", "float32", "--enable-cache-report"),
        *("--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", str(checkpoints.dflash)),
        *("--whiflash-eagle-draft", str(checkpoints.eagle3), "--whiflash-router", router),
        *("--whiflash-lookup-memory-mib", "1"),
    ]


@pytest.fixture
def routed(host: ServerHost, checkpoints: Checkpoints) -> Iterator[tuple[str, list[Server]]]:
    """The router's address and its two servers."""
    pytest.importorskip("sglang_router")
    with ThreadPoolExecutor(2) as pool:
        servers = list(
            pool.map(lambda router: host.start(*arguments(checkpoints, router)), ("random", "auto"))
        )
    port, metrics = free_port(), free_port()
    router = subprocess.Popen(
        [
            *(sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"),
            *("--port", str(port), "--prometheus-port", str(metrics), "--policy", "cache_aware"),
            *("--worker-urls", *(server.url for server in servers)),
        ]
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: router.poll() is not None or serves_both(url))
        assert router.poll() is None
        yield url, servers
    finally:
        router.kill()
        router.wait()
        for server in servers:
            server.stop()


def serves_both(url: str) -> bool:
    if not answers(url + "/health"):
        return False
    listed = httpx.get(url + "/workers", timeout=None).json()["workers"]
    return sum(bool(worker["is_healthy"]) for worker in listed) == 2


def asked(client: OpenAI, messages: Sequence[dict[str, str]], tokens: int = 24) -> Any:
    return client.chat.completions.create(
        model="any",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "cache_salt": "tenant", "custom_params": TRACED},
    )


def traced(answer: Any) -> bool:
    return "whiflash" in (answer.model_extra or {}).get("sglext", {})


def test_conversations_behind_the_router(routed: tuple[str, list[Server]]) -> None:
    """Each stays where its prefix is cached; when a server is killed nobody gets wrong text."""
    url, servers = routed
    client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=None)
    rng = random.Random(1)
    conversations = [
        [{"role": "user", "content": "".join(rng.choices("abcdefgh ", k=120))}] for _ in range(4)
    ]
    for turn in range(3):
        for messages in conversations:
            answer = asked(client, messages)
            assert not traced(answer), "the router hands hints on now: say so in docs/how-to/scaling-out.md"
            cached = answer.usage.prompt_tokens_details
            # All but the newest answer and question was there, were it on the same server.
            assert turn == 0 or cached.cached_tokens >= 100
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            messages.append({"role": "user", "content": f"and {turn}?"})
    states = [server.get("/whiflash/state") for server in servers]
    assert all(state["rounds"] for state in states)
    assert not any(state["lookup"]["tenants"] for state in states), "the router hands salts on now: say so"

    direct = OpenAI(base_url=servers[0].url + "/v1", api_key="none", max_retries=0, timeout=None)
    answered = [asked(direct, messages, LONG) for messages in conversations]
    assert all(map(traced, answered))
    assert servers[0].get("/whiflash/state")["lookup"]["tenants"] == 1
    expected = [answer.choices[0].message.content for answer in answered]
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(asked, client, messages, LONG) for messages in conversations]
        wait_until(lambda: servers[1].get("/whiflash/state")["requests"] or all(w.done() for w in waiting))
        os.killpg(servers[1].pid, signal.SIGKILL)
        servers[1].stop()
        for future, right in zip(waiting, expected, strict=True):
            try:
                assert future.result().choices[0].message.content == right
            except APIError as error:
                print("the client was told:", error)
    # The router goes on with the server that is left.
    assert asked(client, conversations[0], LONG).choices[0].message.content == expected[0]

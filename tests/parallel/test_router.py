"""Two servers of the embedded model behind SGLang's own router: conversations, the example agents, and a server's end.

The tests share the servers; the last one kills one of them.
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from example_agents import run_example
from openai import APIError, OpenAI
from patience import wait_until
from server_host import Server, ServerHost, answers

from whiflash_lab.servers import free_port
from whiflash_sglang.cli.serve import server_arguments, server_environment

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

Messages = list[dict[str, str]]

LONG = 32
"""Tokens of an answer in whose middle a server can be killed."""
TRACED = {"whiflash": '{"trace":"summary"}'}


@dataclass(frozen=True)
class Routed:
    """url: the router's."""

    url: str
    servers: Sequence[Server]

    def client(self, url: str | None = None) -> OpenAI:
        """A client of the router, or of a server."""
        return OpenAI(base_url=f"{url or self.url}/v1", api_key="none", max_retries=0, timeout=None)


@pytest.fixture(scope="module")
def routed(host: ServerHost) -> Iterator[Routed]:
    """In fp32, where the text does not depend on batch shapes, so not on a server's policy either."""
    pytest.importorskip("sglang_router")

    def started(policy: str) -> Server:
        flags = ["--context-length", "4096", "--dtype", "float32", "--enable-cache-report"]
        flags += ["--whiflash-router", policy]
        return host.start(*server_arguments(flags), env=server_environment(flags))

    with ThreadPoolExecutor(2) as pool:
        servers = list(pool.map(started, ("random", "auto")))
    url = f"http://127.0.0.1:{free_port()}"
    router = subprocess.Popen(
        [
            *(sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"),
            *("--port", url.rpartition(":")[2], "--prometheus-port", str(free_port())),
            *("--policy", "cache_aware", "--worker-urls", *(server.url for server in servers)),
        ]
    )
    try:
        wait_until(lambda: router.poll() is not None or serves_both(url))
        assert router.poll() is None
        yield Routed(url, servers)
    finally:
        router.kill()
        router.wait()
        for server in servers:
            server.close()


def serves_both(url: str) -> bool:
    if not answers(url + "/health"):
        return False
    listed = httpx.get(url + "/workers", timeout=None).json()["workers"]
    return sum(bool(worker["is_healthy"]) for worker in listed) == 2


def conversations(count: int, seed: int) -> list[Messages]:
    rng = random.Random(seed)
    return [[{"role": "user", "content": "".join(rng.choices("abcdefgh ", k=120))}] for _ in range(count)]


def asked(client: OpenAI, messages: Messages, tokens: int = 16, salt: str = "tenant") -> Any:
    return client.chat.completions.create(
        model="any",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "cache_salt": salt, "custom_params": TRACED},
    )


def traced(answer: Any) -> bool:
    return "whiflash" in (answer.model_extra or {}).get("sglext", {})


def text(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


def test_conversations_stay_where_their_prefix_is(routed: Routed) -> None:
    """And what the router drops stands in docs/how-to/scaling-out.md."""
    client = routed.client()
    going = [(messages, 0) for messages in conversations(4, seed=1)]
    for turn in range(3):
        for number, (messages, before) in enumerate(going):
            answer = asked(client, messages)
            assert not traced(answer), "the router hands hints on now: say so on the page"
            # The whole prompt of the turn before, its last token perhaps not, were it on the same server.
            assert cached(answer) >= before - 1
            messages.append({"role": "assistant", "content": text(answer)})
            messages.append({"role": "user", "content": f"and {turn}?"})
            going[number] = (messages, answer.usage.prompt_tokens)
    assert all(server.get("/whiflash/state")["rounds"] for server in routed.servers)
    others = cached(asked(client, going[0][0], salt="another"))
    assert others >= going[0][1] - 1, "the router hands salts on now: say so on the page"
    for path in ("capabilities", "state"):
        assert httpx.get(f"{routed.url}/whiflash/{path}", timeout=None).status_code == 404
    first = routed.servers[0]
    assert traced(asked(routed.client(first.url), going[0][0]))
    assert cached(asked(routed.client(first.url), going[0][0], salt="another")) <= 1


def test_the_example_agents_run_unchanged(routed: Routed, tmp_path: Path) -> None:
    """They reach their ends, tools called and results read; of the routing they are told nothing."""
    known = ["extract.py", "langgraph_agent.py", "tool_loop.py"]
    with ThreadPoolExecutor(2) as pool:
        outputs = pool.map(lambda name: run_example(name, routed.url, tmp_path / f"{name}.html"), known)
        for name, output in zip(known, outputs, strict=True):
            assert "The server sent no routing traces." in output, name


def test_a_killed_server_gives_nobody_wrong_text(routed: Routed) -> None:
    """The client is told an error, or has the whole answer of the server that is left; that one goes on alone."""
    asking = conversations(4, seed=2)
    direct, client = routed.client(routed.servers[0].url), routed.client()
    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(lambda messages: text(asked(direct, messages, LONG)), asking))
        waiting = [pool.submit(asked, client, messages, LONG) for messages in asking]
        wait_until(lambda: any(map(at_work, routed.servers)) or all(future.done() for future in waiting))
        killed = max(routed.servers, key=at_work)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.close()
        told = 0
        for future, right in zip(waiting, expected, strict=True):
            try:
                assert text(future.result()) == right
            except APIError as error:
                told += 1
                print("the client was told:", error)
        print(f"{told} of {len(waiting)} were told an error")
    assert text(asked(client, asking[0], LONG)) == expected[0]


def at_work(server: Server) -> int:
    """Requests that run there."""
    return int(server.get("/whiflash/state")["requests"])

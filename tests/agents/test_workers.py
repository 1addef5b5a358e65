"""`--tokenizer-worker-num` above one: every process that serves HTTP takes hints, answers traces and steers."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest
from server_host import Server, ServerHost
from tiny_models import served_pair

pytestmark = pytest.mark.server

WORKERS = 2
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "one two three four one two three four one two"}],
    "temperature": 0,
    "max_tokens": 24,
    "ignore_eos": True,
    "custom_params": {"whiflash": '{"trace": "full"}'},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, host: ServerHost) -> Iterator[Server]:
    arguments = served_pair(tmp_path_factory.mktemp("checkpoints"))
    arguments += ["--tokenizer-worker-num", str(WORKERS), "--enable-cache-report"]
    with host.running(*arguments) as running:
        yield running


@pytest.fixture(scope="module")
def workers(server: Server) -> Iterator[list[httpx.Client]]:
    """A client with a connection to each worker, which answers all that comes over it."""
    found: dict[int, httpx.Client] = {}
    with ExitStack() as open_clients:
        while len(found) < WORKERS:
            client = open_clients.enter_context(httpx.Client(base_url=server.url, timeout=None))
            client.get("/whiflash/capabilities").raise_for_status()
            for process in psutil.Process(server.pid).children(recursive=True):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == server.port:
                        found.setdefault(process.pid, client)
        yield list(found.values())


def test_every_worker_answers_with_traces(workers: list[httpx.Client]) -> None:
    texts = []
    for client in workers:
        answer = client.post("/v1/chat/completions", json=CHAT).raise_for_status().json()
        texts.append(answer["choices"][0]["message"]["content"])
        trace = answer["sglext"]["whiflash"]
        assert (trace["tokens"], trace["policy"]) == (23, "auto")
        assert trace["stretches"]
        with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
            assert '"whiflash":' in "".join(stream.iter_text())
    assert len(set(texts)) == 1


def test_the_cache_is_reported(workers: list[httpx.Client]) -> None:
    """A second time all of a prompt is cached but the last token, and one more where a key of the tree is two."""
    usages = [client.post("/v1/chat/completions", json=CHAT).json()["usage"] for client in (*workers, *workers)]
    cached = usages[-1]["prompt_tokens_details"]["cached_tokens"]
    assert usages[-1]["prompt_tokens"] - cached in (1, 2)


def test_every_worker_checks_hints(workers: list[httpx.Client]) -> None:
    wrong = {**CHAT, "custom_params": {"whiflash": '{"trace": "loud"}'}}
    assert [client.post("/v1/chat/completions", json=wrong).status_code for client in workers] == [400] * WORKERS


def test_a_change_through_one_worker_is_every_workers(workers: list[httpx.Client]) -> None:
    for changer, policy in zip(workers, ("lookup", "ar"), strict=True):
        changer.post("/whiflash/policy", json={"router": policy}).raise_for_status()
        for client in workers:
            assert client.get("/whiflash/state").json()["policy"] == policy
            assert client.get("/whiflash/capabilities").json()["policy"] == policy
            answer = client.post("/v1/chat/completions", json=CHAT).raise_for_status().json()
            assert answer["sglext"]["whiflash"]["policy"] == policy
        assert changer.post("/whiflash/policy", json={"router": "fastest"}).status_code == 400
        assert changer.post("/whiflash/forget", json={"all": True}).status_code == 200

"""A real server's samples on disk, and what it keeps of tenants, whom SGLang's own fields name."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from model_set import Models
from patience import wait_until
from server_host import Server, ServerHost

from whiflash_sglang.copying.tenants import handle_of, tenant_of
from whiflash_sglang.telemetry.samples import files_of, samples_of

pytestmark = pytest.mark.server

KEY = "the-admin"
ADMIN = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def learning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of `--whiflash-learn`."""
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(scope="module")
def server(models: Models, learning: Path, host: ServerHost) -> Iterator[Server]:
    with host.running(*models.served("random", KEY, whiflash_learn=learning)) as running:
        yield running


def state(server: Server) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/whiflash/state", headers=ADMIN, timeout=None)
    return dict(answer.raise_for_status().json())


PROMPT = random.Random(5).choices(range(256), k=24)


def ask(server: Server, **keys: str) -> None:
    server.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 40}, **keys)


def test_the_servers_own_requests_are_no_samples(server: Server) -> None:
    """Its warm-up, and health checks, with which whoever started it has waited for it."""

    def declined() -> int:
        return int(state(server)["samples"]["declined"])

    warm_up = declined()
    assert warm_up >= 1
    assert httpx.get(f"{server.url}/health_generate", timeout=None).status_code == 200
    wait_until(lambda: declined() == warm_up + 1)


def test_forgetting_reaches_samples_on_disk(server: Server, learning: Path) -> None:
    directory = samples_of(learning)
    server.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 4}, cache_salt="a")
    wait_until(lambda: files_of(directory))
    assert forget(server, {"all": True}).status_code == 200
    assert files_of(directory) == []


def forget(server: Server, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/whiflash/forget", json=body, headers=ADMIN, timeout=None)


def tenants(server: Server) -> int:
    return int(state(server)["lookup"]["tenants"])


def test_forgetting_over_http(server: Server) -> None:
    forget(server, {"all": True})
    ask(server)
    assert tenants(server) == 0, "a request without a key left something behind"
    assert handle_of(tenant_of(None, "a") or b"") > 2**53, "a float would round it"
    for salt in ("a", "b", "c"):
        ask(server, cache_salt=salt)
    ask(server, cache_salt="a", extra_key="k")
    assert tenants(server) == 4
    answer = forget(server, {"cache_salt": "a"})
    assert (answer.status_code, answer.json()["lookup"]["tenants"]) == (200, 3)
    assert forget(server, {"cache_salt": "never seen"}).json()["lookup"]["tenants"] == 3
    assert forget(server, {"cache_salt": "a", "extra_key": "k"}).json()["lookup"]["tenants"] == 2
    assert forget(server, {"all": True}).json()["lookup"] == {"index_bytes": 0, "tenants": 0}

"""A real server's samples on disk, by tenants, whom SGLang's own fields name."""

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


def test_the_servers_own_requests_are_no_samples(server: Server) -> None:
    """Its warm-up, and health checks, with which whoever started it has waited for it."""

    def declined() -> int:
        return int(state(server)["samples"]["declined"])

    warm_up = declined()
    assert warm_up >= 1
    assert httpx.get(f"{server.url}/health_generate", timeout=None).status_code == 200
    wait_until(lambda: declined() == warm_up + 1)


def test_forgetting_reaches_samples_on_disk(server: Server, learning: Path) -> None:
    def prompts() -> set[str]:
        texts = [file.read_text() for file in files_of(samples_of(learning))]
        return {prompt for prompt in ("[1,2,3]", "[3,2,1]") if any(prompt in text for text in texts)}

    for salt, prompt in (("a", [1, 2, 3]), ("b", [3, 2, 1])):
        server.generate(input_ids=prompt, sampling_params={"max_new_tokens": 4}, cache_salt=salt)
    wait_until(lambda: len(prompts()) == 2)
    assert handle_of(tenant_of(None, "a") or b"") > 2**53, "a float would round it"
    for body, rest in (({"cache_salt": "unseen"}, 2), ({"cache_salt": "a"}, 1), ({"all": True}, 0)):
        assert forget(server, body).status_code == 200
        assert len(prompts()) == rest
    assert files_of(samples_of(learning)) == {}


def forget(server: Server, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/whiflash/forget", json=body, headers=ADMIN, timeout=None)

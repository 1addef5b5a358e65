"""Memory across requests over HTTP: SGLang's own fields name the tenant, our route forgets."""

import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from model_set import Models
from server_host import Server, ServerHost

from whiflash_sglang.lookup.memory import handle_of, tenant_of

pytestmark = pytest.mark.server

ADMIN = {"Authorization": "Bearer the-admin"}
PROMPT = random.Random(5).choices(range(256), k=24)


@pytest.fixture(scope="module")
def server(models: Models, host: ServerHost) -> Iterator[Server]:
    with host.running(*models.served("lookup", "the-admin", whiflash_lookup_memory_mib=1)) as running:
        yield running


def ask(server: Server, **keys: str) -> None:
    server.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 40}, **keys)


def forget(server: Server, body: Any, headers: dict[str, str] = ADMIN) -> httpx.Response:
    return httpx.post(f"{server.url}/whiflash/forget", json=body, headers=headers, timeout=None)


def state(server: Server) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/whiflash/state", headers=ADMIN, timeout=None)
    found: dict[str, Any] = answer.raise_for_status().json()["lookup"]
    return found


def tenants(server: Server) -> int:
    found: int = state(server)["tenants"]
    return found


def test_forgetting_over_http(server: Server) -> None:
    ask(server)
    assert tenants(server) == 0, "a request without a key left something behind"
    for salt in ("a", "b", "c"):
        ask(server, cache_salt=salt)
    ask(server, cache_salt="a", extra_key="k")
    assert tenants(server) == 4
    answer = forget(server, {"cache_salt": "a"})
    assert (answer.status_code, answer.json()["lookup"]["tenants"]) == (200, 3)
    assert forget(server, {"cache_salt": "never seen"}).json()["lookup"]["tenants"] == 3
    assert forget(server, {"cache_salt": "a", "extra_key": "k"}).json()["lookup"]["tenants"] == 2
    assert forget(server, {"all": True}).json()["lookup"] == {
        "index_bytes": 0,
        "memory_bytes": 0,
        "tenants": 0,
    }


def test_only_the_administrator_forgets(server: Server) -> None:
    ask(server, cache_salt="a")
    assert forget(server, {"all": True}, headers={}).status_code in (401, 403)
    assert tenants(server) == 1


@pytest.mark.parametrize(
    "body",
    [{}, {"all": 1}, {"salt": "a"}, {"all": True, "cache_salt": "a"}, {"cache_salt": "a", "agent": "b"}],
)
def test_a_malformed_body_is_a_400(server: Server, body: dict[str, Any]) -> None:
    answer = forget(server, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_large_handles_survive_the_message(server: Server) -> None:
    """A float would round 63 bits."""
    salt = next(s for s in map(str, range(1000)) if handle_of(tenant_of(None, s) or b"") > 2**62)
    ask(server, cache_salt=salt)
    before = tenants(server)
    assert forget(server, {"cache_salt": salt}).json()["lookup"]["tenants"] == before - 1


def test_the_state_is_the_administrators(server: Server) -> None:
    """SGLang's own `/server_info` needs no key here, and holds nothing of it."""
    ask(server)
    assert httpx.get(f"{server.url}/whiflash/state", timeout=None).status_code == 401
    (state,) = server.get("/server_info")["internal_states"]
    assert "max_running_requests" in state
    assert "whiflash" not in state


EVER_WRONG = ("NaN", '"NaN"', '"inf"', '"-inf"', "[1]", '"a"', "null")
WRONG = {
    "router": (*EVER_WRONG, "-1", "-2", "1.5", "99", f"1{'0' * 30}"),
    "min_dwell": (*EVER_WRONG, "-1", "1.5", "4294967296", f"1{'0' * 30}"),
    "entropy_threshold": (*EVER_WRONG, "-1"),
    "neural_router_threshold": EVER_WRONG,
    "forget": (*EVER_WRONG, "-2", "1.5", f"{2**63}", f"1{'0' * 30}"),
}
"""JSON. SGLang's route reads a number out of a string too, and so NaN and infinities."""


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_in_sglangs_own_message_harms_nobody(server: Server, key: str) -> None:
    """A scheduler that raises serves nobody any more."""
    for value in WRONG[key]:
        answer = httpx.put(
            f"{server.url}/set_internal_state",
            content=f'{{"server_args": {{"whiflash.{key}": {value}}}}}',
            headers=ADMIN | {"Content-Type": "application/json"},
            timeout=None,
        )
        assert answer.status_code >= 400 or answer.json() == [False], value
        ask(server)

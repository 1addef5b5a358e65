"""A real server's learning: versions that are switched by route and by command line, samples on disk, and texts of
tenants, whom SGLang's own fields name.
"""

import fcntl
import json
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from model_set import Models
from patience import wait_until
from server_host import Server, ServerHost
from typer.testing import CliRunner
from versioned import trained, version

from whiflash_sglang.cli.app import app
from whiflash_sglang.copying.tenants import handle_of, tenant_of
from whiflash_sglang.updates.samples import files_of, samples_of
from whiflash_sglang.updates.versions import claims_of, path_of, versions_of
from whiflash_train.cli.learn import LiveServer
from whiflash_train.learner import once, watch
from whiflash_train.learner.guard import LEAST, Guard
from whiflash_train.learner.once import Outcome
from whiflash_train.learner.texts import LEAST as LEAST_JUDGES

pytestmark = pytest.mark.server

KEY = "the-admin"
ADMIN = {"Authorization": f"Bearer {KEY}"}
TORN = 3


@pytest.fixture(scope="module")
def learning(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of `--whiflash-learn`: two versions, and one that was cut off afterwards."""
    root = tmp_path_factory.mktemp("learning")
    for number in (1, 2, TORN):
        version(models, versions_of(root), root / f"made-{number}", trained(0.3, number))
    weights = path_of(versions_of(root), TORN) / "dflash" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    return root


@pytest.fixture(scope="module")
def server(models: Models, learning: Path, host: ServerHost) -> Iterator[Server]:
    with host.running(*models.served("random", KEY, whiflash_learn=learning)) as running:
        yield running


def use(server: Server, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/whiflash/drafters", json=body, headers=ADMIN, timeout=None)


def route(server: Server, router: str) -> None:
    order = httpx.post(f"{server.url}/whiflash/policy", json={"router": router}, headers=ADMIN, timeout=None)
    assert (order.status_code, order.json()["policy"]) == (200, router)


def state(server: Server) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/whiflash/state", headers=ADMIN, timeout=None)
    return dict(answer.raise_for_status().json())


def drafters(server: Server) -> dict[str, Any]:
    return dict(state(server)["drafters"])


def command(*words: str) -> Result:
    return CliRunner().invoke(app, ["drafter", *words], env={"WHIFLASH_API_KEY": KEY})


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


def test_commands_switch_a_server_and_back(server: Server, learning: Path) -> None:
    use(server, {"version": 0})
    for word, now, before in (("1", 1, 0), ("2", 2, 1), ("before", 1, 2)):
        ran = command(word, "--url", server.url, "--json")
        assert (ran.exit_code, json.loads(ran.stdout)) == (0, {server.url: now})
        assert (drafters(server)["version"], drafters(server)["before"]) == (now, before)
        listed = command("--directory", str(versions_of(learning)))
        assert [line for line in listed.stdout.splitlines() if line.startswith("*")] == [f"* {now}"]


def test_a_version_that_is_read_stops_nobody(
    server: Server, learning: Path, models: Models, tmp_path: Path
) -> None:
    """A file of its does not come, as from a disk that hangs; answers, orders and reports do, and then the next one."""
    slow = version(models, versions_of(learning), tmp_path / "made", trained(0.3, 4))
    weights = path_of(versions_of(learning), slow) / "dflash" / "model.safetensors"
    with ThreadPoolExecutor() as pool, weights.open("rb+") as held:
        fcntl.fcntl(held, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # who opens it waits for its holder
        first = pool.submit(use, server, {"version": slow})
        wait_until(lambda: drafters(server)["loading"] == slow)
        second = pool.submit(use, server, {"version": 1})
        ask(server)
        for router in ("none", "random"):
            route(server, router)
        assert (first.done(), second.done(), drafters(server)["loading"]) == (False, False, slow)
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    assert first.result().status_code == second.result().status_code == 200
    assert drafters(server) == drafters(server) | {"version": 1, "before": slow, "loading": None}


def test_a_version_is_refused_by_its_askers_sums(server: Server, learning: Path) -> None:
    """Before anything is loaded, and without another answer than 400."""
    use(server, {"version": 1})
    said = claims_of(versions_of(learning), 2)
    for change, why in (
        ({"target": "another"}, "the one that is asked for is for 'another'"),
        ({"files": {**said["files"], "dflash/config.json": "0"}}, "dflash/config.json differs"),
    ):
        answer = use(server, {"version": 2, **said, **change})
        assert (answer.status_code, why in answer.json()["error"]["message"]) == (400, True)
    assert drafters(server)["version"] == 1
    assert use(server, {"version": 2, **said}).json()["drafters"]["version"] == 2


@pytest.mark.parametrize("watches", [False, True])
def test_what_was_learned_is_offered(
    server: Server, learning: Path, monkeypatch: pytest.MonkeyPatch, watches: bool
) -> None:
    """Another file covers the results of a pass. One that watches is interrupted when it looks for samples again."""
    monkeypatch.setenv("WHIFLASH_API_KEY", KEY)
    use(server, {"version": 1})
    looks = iter([2 * LEAST_JUDGES])

    def new_samples(_: Path) -> int:
        for count in looks:
            return count
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "new_samples", new_samples)
    words = ["learn", str(learning), "--config", "tiny", "--url", server.url, "--json"]
    for number in (2,) if watches else (2, None):
        counts = {"learned": 100, "judged": 16, "tokens": 2400, "seconds": 1.0, "until": 0.0}
        found = Outcome(present=1, version=number, drafters={}, **counts)
        for module in (once, watch):
            monkeypatch.setattr(module, "learn_once", lambda *_, found=found: found)
        ran = CliRunner().invoke(app, [*words, *(["--watch"] if watches else [])])
        told = json.loads(ran.stdout.splitlines()[0])
        assert told["version" if watches else "served"] == 2 if number else "served" not in told
        assert drafters(server)["version"] == 2


def test_what_accepts_less_of_live_traffic_is_left(
    server: Server, learning: Path, models: Models, tmp_path: Path
) -> None:
    """Drafters whose every choice is the worst: the guard asks the server, and switches it back by the same route.

    One arm drafts every round. Random routes depend on which requests run together, and some of them leave the guard
    too few drafts to be sure of the drop.
    """
    wrong = version(
        models,
        versions_of(learning),
        tmp_path / "made",
        lambda name, value: -value if name == "norm.weight" else value,
    )
    use(server, {"version": 0})
    route(server, "diffusion")
    draw = random.Random(6)
    bodies = [
        {"input_ids": draw.choices(range(256), k=12), "sampling_params": {"max_new_tokens": 24}}
        for _ in range(2 * LEAST)
    ]
    guard = Guard(LiveServer(server.url, KEY, versions_of(learning)), tmp_path)
    assert guard.look() is None
    server.generate_all(bodies, concurrency=8)
    guard.switch(wrong)
    assert drafters(server)["version"] == wrong
    server.generate_all(bodies, concurrency=8)
    drop = guard.look()
    route(server, "random")
    assert drop is not None
    assert (drop.version, drop.now, drafters(server)["version"]) == (wrong, 0, 0)
    control = [line for line in server.log.read_text().splitlines() if "control: drafters" in line]
    assert [json.loads(line.partition("drafters ")[2].partition(", from")[0]) for line in control[-2:]] == [
        {"version": wrong},
        {"version": 0},
    ]


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

"""Effects of our routes, and the line that each call leaves. Rights to call them: `test_authorisation.py`."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute, APIWebSocketRoute
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.copying.tenants import parse_forget
from whiflash_sglang.files.hosts import SilentReplicaError
from whiflash_sglang.http import routes
from whiflash_sglang.settings.config import Flags, resolve

STEERING = ("/whiflash/policy", "/whiflash/forget")
FOR = {("GET", "/whiflash/capabilities"), ("GET", "/whiflash/state"), *(("POST", path) for path in STEERING)}
BODIES: dict[str, Any] = {"/whiflash/policy": {"min_dwell": 3}, "/whiflash/forget": {"all": True}}


class Manager:
    """The tokenizer manager as far as the routes ask it; `sent` is what reached the schedulers."""

    def __init__(self) -> None:
        self.server_args = SimpleNamespace(
            _whiflash=resolve(Flags(), embedded_bundle()),
            served_model_name="tiny",
            model_path="tiny",
            tokenizer_worker_num=1,
            enable_session_radix_cache=True,
            disable_radix_cache=False,
            attn_dp_size=1,
            enable_dp_attention=False,
            pp_size=1,
            disaggregation_mode="null",
        )
        self.sent: list[Any] = []
        self.taken = True

    def config_value(self, name: str) -> Any:
        return "cpu" if name == "device" else getattr(self.server_args, name, None)

    def auto_create_handle_loop(self) -> None:
        return

    async def get_internal_state_communicator(self, request: Any) -> list[Any]:
        ended = {message.rid: "" for message in self.sent}
        state = {"rounds": 1, "replica": None, "question": request.rid, "costs": {}, "ended": ended}
        return [SimpleNamespace(rid="0", internal_state={"whiflash": state})]

    async def get_internal_state(self) -> list[Any]:
        return [{"whiflash": {"rounds": 1}}]

    async def set_internal_state(self, message: Any) -> list[bool]:
        self.sent.append(message)
        return [True, self.taken]


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Manager:
    made = Manager()
    monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=made))
    return made


@pytest.fixture
def client(manager: Manager) -> TestClient:
    """A client of our routes."""
    routes.install()
    return TestClient(FastAPI(routes=our_routes()))


def our_routes() -> list[Any]:
    return [r for r in http_server.app.routes if getattr(r, "path", "").startswith("/whiflash/")]


def test_every_route_answers_and_only_those_that_steer_send(client: TestClient, manager: Manager) -> None:
    assert {(method, route.path) for route in our_routes() for method in route.methods} == FOR
    for method, path in FOR:
        manager.sent.clear()
        assert client.request(method, path, json=BODIES.get(path)).status_code == 200
        assert bool(manager.sent) == (path in STEERING)


@pytest.mark.parametrize(
    "body",
    [
        '{"router": NaN}',
        '{"min_dwell": "3"}',
        '{"min_dwell": true}',
        '{"min_dwell": 1.5}',
        f'{{"min_dwell": 1{"0" * 30}}}',
        f'{{"entropy_threshold": 1{"0" * 400}}}',
        '{"entropy_threshold": 1e999}',
        '{"entropy_threshold": "1"}',
        '{"router": ["ar"]}',
        '{"tau": 1}',
        '{"router":',
        '["ar"]',
    ],
)
def test_a_wrong_change_of_policy_is_a_400_and_reaches_no_scheduler(
    client: TestClient, manager: Manager, body: str
) -> None:
    json_body = {"Content-Type": "application/json"}
    answer = client.post("/whiflash/policy", content=body, headers=json_body)
    # 422 where FastAPI refuses to read it, which SGLang's own handler turns into 400.
    assert answer.status_code in (400, 422)
    assert answer.json()
    assert "/" not in answer.text, "no path of the server"
    assert not manager.sent


def test_capabilities_name_routes_limits_and_the_policy_in_force(client: TestClient) -> None:
    document = client.get("/whiflash/capabilities").json()
    assert document["routes"][:3] == ["chat/completions", "completions", "messages"]
    assert document["limits"] == {"spans": 16, "marker_chars": 64, "name_chars": 64, "bytes": 8192}
    assert document["policy"] == "auto"
    assert client.post("/whiflash/policy", json={"router": "none"}).status_code == 200
    assert client.get("/whiflash/capabilities").json()["policy"] == "none"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_is_not_called_json_steers_nothing(client: TestClient, manager: Manager, kind: str) -> None:
    """A page sends those to any server without its leave."""
    for path in STEERING:
        body = json.dumps(BODIES[path])
        assert client.post(path, content=body, headers={"Content-Type": kind}).status_code == 400
    assert not manager.sent


@pytest.mark.parametrize(
    ("backend", "sessions", "said"),
    [
        ("shm", False, "give file"),
        ("sim", False, "give file"),
        ("file", True, "streaming-session"),
        ("file", False, ""),
    ],
)
def test_storage_is_attached_by_the_rules_of_a_launch(
    manager: Manager, backend: str, sessions: bool, said: str
) -> None:
    """A server that is refused at its start does not become one while it serves."""
    manager.server_args.enable_streaming_session = sessions

    async def original(*_: Any) -> Any:
        return SimpleNamespace(success=True, message="")

    answer = asyncio.run(routes._attach_storage(original, manager, backend))
    assert answer.success is (not said)
    assert said in answer.message


SALT = "a-tenant's-secret"
TENANT = f"{parse_forget({'cache_salt': SALT}):016x}"
DONE, REFUSED = "done", "refused with 400"


@pytest.mark.parametrize(
    ("path", "body", "said", "became"),
    [
        ("policy", {"router": "none", "min_dwell": 3}, '{"router": "none", "min_dwell": 3}', DONE),
        ("forget", {"all": True}, '{"all": true}', DONE),
        ("forget", {"cache_salt": SALT}, f'{{"tenant": "{TENANT}"}}', DONE),
        ("forget", {"cache_salt": SALT, "agent": "planner"}, "{}", REFUSED),
        ("policy", {"router": "nonsense", "\nforged": 1}, '{"router": "nonsense"}', REFUSED),
        ("policy", {"router": "x\ny" * 100}, '{"router": "..."}', REFUSED),
        ("policy", {"min_dwell": {SALT: 1}}, '{"min_dwell": "..."}', REFUSED),
        ("forget", {"cache_salt": SALT, "all": True}, "{}", REFUSED),
        ("forget", {"salt": SALT}, "{}", REFUSED),
        ("policy", {"router": "ar"}, '{"router": "ar"}', REFUSED),  # by a scheduler
    ],
)
def test_every_call_that_steers_leaves_a_line_that_nobody_else_wrote(
    client: TestClient,
    manager: Manager,
    caplog: pytest.LogCaptureFixture,
    path: str,
    body: dict[str, Any],
    said: str,
    became: str,
) -> None:
    caplog.set_level("INFO")
    manager.taken = body != {"router": "ar"}
    answer = client.post(f"/whiflash/{path}", json=body)
    assert answer.status_code == (200 if became == DONE else 400)
    client.get("/whiflash/state")
    told = [record.getMessage() for record in caplog.records if record.name == "whiflash_sglang"]
    assert told == [f"control: {path} {said}, from testclient: {became}"]
    assert SALT not in caplog.text


def test_nothing_is_changed_where_a_replica_is_silent(
    client: TestClient, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "states_of", _nobody_answers)
    for method, path in FOR:
        answer = client.request(method, path, json=BODIES.get(path), params={"timeout": 3})
        if path != "/whiflash/capabilities":
            assert answer.status_code == 504
            assert "replica 1 of 2 has not answered in " in answer.json()["error"]["message"]
    assert not manager.sent
    for wrong in ("0", "-1", "nan", "inf", "soon"):
        assert client.get("/whiflash/state", params={"timeout": wrong}).status_code == 422


async def _nobody_answers(manager: Manager, seconds: float) -> None:
    raise SilentReplicaError({0}, 2, seconds or 300)


def streaming_routes() -> Iterator[str]:
    """SGLang's routes that may stream: websockets, and those whose request has a field `stream`, or brings on another's
    fields (`parameters`).
    """
    for route in http_server.app.routes:
        if isinstance(route, APIWebSocketRoute):
            yield route.path
        elif isinstance(route, APIRoute) and "POST" in route.methods:
            given = get_type_hints(route.endpoint)
            bodies = [name for hint in given.values() if isinstance(hint, type) for name in names_in(hint)]
            if {"stream", "parameters"} & {*given, *bodies}:
                yield route.path


def names_in(body: type) -> Iterator[str]:
    for part in body.__mro__:
        yield from vars(part).get("__annotations__", {})


def test_every_route_that_streams_is_compared() -> None:
    """With the page's table, and each that serves text with plain decoding."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "reference" / "server.md").read_text("utf-8")
    rows = re.findall(r"(?m)^\| (`/.*`) \| (.*) \|$", page.partition("## Streams")[2].partition("\n## ")[0])
    named = {route: chunks for paths, chunks in rows for route in re.findall(r"`(.*?)`", paths)}
    assert set(streaming_routes()) == set(named)
    served = {route for route, chunks in named.items() if not chunks.startswith("none")}
    cases = (root / "tests" / "agents" / "test_parsed_streams.py").read_text("utf-8").partition("CASES:")[2]
    assert set(re.findall(r'"(/[\w/]+)",', cases)) == served

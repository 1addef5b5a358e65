"""Who may use our routes: every one of them under every combination of SGLang's keys."""

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
from sglang.srt.utils.auth import add_api_key_middleware

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.compat.http import routes
from whiflash_sglang.config import Flags, resolve
from whiflash_sglang.lookup.memory import parse_forget
from whiflash_sglang.serving import SilentReplicaError

KEYS = {"none": None, "user": "the-user", "admin": "the-admin", "wrong": "guess"}
SERVERS = {
    "open": (None, None),
    "api": ("the-user", None),
    "admin": (None, "the-admin"),
    "both": ("the-user", "the-admin"),
}
EVERYBODY = set(KEYS)
ALLOWED = {
    "open": {"anyone": EVERYBODY, "operator": EVERYBODY},
    "api": {"anyone": {"user"}, "operator": {"user"}},
    "admin": {"anyone": EVERYBODY, "operator": {"admin"}},
    "both": {"anyone": {"user"}, "operator": {"admin"}},
}
"""By server, whose key opens what everybody may use who may ask for answers, and what is an operator's."""

FOR = {
    ("GET", "/whiflash/capabilities"): "anyone",
    ("GET", "/whiflash/state"): "operator",
    ("POST", "/whiflash/policy"): "operator",
    ("POST", "/whiflash/forget"): "operator",
    ("POST", "/whiflash/drafters"): "operator",
}
BODIES: dict[str, Any] = {
    "/whiflash/policy": {"min_dwell": 3},
    "/whiflash/forget": {"all": True},
    "/whiflash/drafters": {"version": 3},
}


class Manager:
    """The tokenizer manager as far as the routes ask it; `sent` is what reached the schedulers."""

    def __init__(self) -> None:
        self.server_args = SimpleNamespace(
            _whiflash=resolve(Flags(versions="versions"), embedded_bundle()),
            served_model_name="tiny",
            model_path="tiny",
            tokenizer_worker_num=1,
        )
        self.sent: list[Any] = []

    def config_value(self, name: str) -> Any:
        return "cpu" if name == "device" else getattr(self.server_args, name, None)

    def auto_create_handle_loop(self) -> None:
        return

    async def get_internal_state_communicator(self, request: Any) -> list[Any]:
        state = {"rounds": 1, "replica": None, "question": request.rid, "costs": {}}
        return [SimpleNamespace(rid="0", internal_state={"whiflash": state})]

    async def get_internal_state(self) -> list[Any]:
        return [{"whiflash": {"rounds": 1}}]

    async def set_internal_state(self, message: Any) -> list[bool]:
        self.sent.append(message)
        return [True]


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Manager:
    made = Manager()
    monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=made))
    return made


def client_of(manager: Manager, server: str) -> TestClient:
    """A client of our routes behind SGLang's own middleware."""
    routes.install()
    app = FastAPI(routes=our_routes())
    user, admin = SERVERS[server]
    manager.server_args.admin_api_key = admin
    add_api_key_middleware(app, api_key=user, admin_api_key=admin)
    return TestClient(app)


def our_routes() -> list[Any]:
    return [r for r in http_server.app.routes if getattr(r, "path", "").startswith("/whiflash/")]


def test_every_route_of_ours_is_in_the_table(manager: Manager) -> None:
    client_of(manager, "open")
    found = {(method, route.path) for route in our_routes() for method in route.methods}
    assert found == FOR.keys()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(("method", "path"), FOR)
def test_a_route_opens_for_its_keys_alone(
    manager: Manager, method: str, path: str, server: str, key: str
) -> None:
    headers = {"Authorization": f"Bearer {KEYS[key]}"} if KEYS[key] else {}
    answer = client_of(manager, server).request(method, path, json=BODIES.get(path), headers=headers)
    allowed = key in ALLOWED[server][FOR[method, path]]
    assert answer.status_code == (200 if allowed else 401)
    assert bool(manager.sent) == (allowed and method == "POST")
    assert allowed or answer.json() == {"error": "Unauthorized"}


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
    ],
)
def test_a_wrong_change_of_policy_is_a_400_and_reaches_no_scheduler(manager: Manager, body: str) -> None:
    json_body = {"Content-Type": "application/json"}
    answer = client_of(manager, "open").post("/whiflash/policy", content=body, headers=json_body)
    # 422 where FastAPI refuses to read it, which SGLang's own handler turns into 400.
    assert answer.status_code in (400, 422)
    assert answer.json()
    assert not manager.sent


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "whiflash_sglang"]


SALT = "a-tenant's-secret"


def test_every_call_that_steers_leaves_a_line(manager: Manager, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    client = client_of(manager, "open")
    client.post("/whiflash/policy", json={"router": "none", "min_dwell": 3})
    client.post("/whiflash/forget", json={"all": True})
    client.post("/whiflash/forget", json={"cache_salt": SALT})
    assert client.post("/whiflash/forget", json={"cache_salt": SALT, "agent": "planner"}).status_code == 400
    client.post("/whiflash/drafters", json={"version": 3})
    client.get("/whiflash/state")
    tenant = f"{parse_forget({'cache_salt': SALT}):016x}"
    assert told(caplog) == [
        'control: policy {"router": "none", "min_dwell": 3}, from testclient: done',
        'control: forget {"all": true}, from testclient: done',
        f'control: forget {{"tenant": "{tenant}"}}, from testclient: done',
        "control: forget {}, from testclient: refused with 400",
        'control: drafters {"version": 3}, from testclient: done',
    ]
    assert SALT not in caplog.text


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("policy", {"router": "nonsense", "\nforged": 1}, '{"router": "nonsense"}'),
        ("policy", {"router": "x\ny" * 100}, '{"router": "..."}'),
        ("policy", {"min_dwell": {SALT: 1}}, '{"min_dwell": "..."}'),
        ("forget", {"cache_salt": SALT, "all": True}, "{}"),
        ("forget", {"salt": SALT}, "{}"),
    ],
)
def test_what_was_refused_leaves_a_line_that_nobody_else_wrote(
    manager: Manager, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any], said: str
) -> None:
    caplog.set_level("INFO")
    assert client_of(manager, "open").post(f"/whiflash/{path}", json=body).status_code == 400
    assert told(caplog) == [f"control: {path} {said}, from testclient: refused with 400"]
    assert SALT not in caplog.text


def test_what_a_scheduler_refuses_is_no_done(manager: Manager, caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(_: Any) -> list[bool]:
        return [True, False]

    caplog.set_level("INFO")
    manager.set_internal_state = refuse  # type: ignore[method-assign]
    client_of(manager, "open").post("/whiflash/policy", json={"router": "none"})
    assert told(caplog) == ['control: policy {"router": "none"}, from testclient: refused with 400']


def test_nothing_is_changed_where_a_replica_is_silent(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "states_of", _nobody_answers)
    client = client_of(manager, "open")
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

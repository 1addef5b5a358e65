"""Rights to every route of a WHIFLASH server, SGLang's and ours, by every combination of keys.

The decision is SGLang's own middleware's, of its own routes; nothing runs after it.
"""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints import elastic_ep, engine, http_server, v1_loads
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.auth import add_api_key_middleware

from whiflash_sglang.engine import patching
from whiflash_sglang.engine.launch import keys
from whiflash_sglang.http import routes as http_routes

PROBES = {"/health", "/health_generate", "/ready", "/metrics"}
"""Open to all, whatever keys there are: orchestrators and Prometheus have none."""

CLIENTS = {
    # who asks for answers
    *("/generate", "/invocations", "/vertex_generate", "/encode", "/classify", "/parse_function_call"),
    *("/separate_reasoning", "/open_session", "/close_session", "/v1/completions", "/v1/chat/completions"),
    *("/v1/embeddings", "/v1/classify", "/v1/tokenize", "/tokenize", "/v1/detokenize", "/detokenize"),
    *("/v1/audio/transcriptions", "/v1/models", "/v1/models/{model:path}", "/v1/score", "/v1/decisions"),
    *("/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel", "/v1/rerank"),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/systemone", "/whiflash/capabilities"),
    *("/api/chat", "/api/generate", "/api/tags", "/api/show"),
    # marked as an operator's, which SGLang's check does not see in a router that its application includes
    *("/scale_elastic_ep", "/is_scaling_elastic_ep"),
    # who looks at the server
    *("/ping", "/get_model_info", "/model_info", "/get_server_info", "/server_info", "/v1/loads", "/"),
    *("/get_hicache_l3_cache_layout", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
}
"""For holders of the API key; for everybody where there is none."""

SERVERS = {"open": (None, None), "api": ("user", None), "admin": (None, "boss"), "both": ("user", "boss")}


def may(path: str, server: str, key: str | None) -> bool:
    """The rule of SECURITY.md."""
    api, admin = SERVERS[server]
    if path in PROBES:
        return True
    wanted = api if path in CLIENTS else admin or api
    return wanted is None or key == wanted


class App:
    """SGLang's routes behind its middleware, with nothing behind them."""

    def __init__(self, server: str) -> None:
        self.router = http_server.app.router
        api, admin = SERVERS[server]
        add_api_key_middleware(self, api_key=api, admin_api_key=admin)

    def add_middleware(self, middleware: Any, **options: Any) -> None:
        self._guarded = middleware(self._reached, **options)

    async def _reached(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(self, method: str, path: str, key: str | None) -> int:
        sent: list[Any] = []

        async def send(part: Any) -> None:
            sent.append(part)

        headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
        asyncio.run(self._guarded(scope, None, send))
        return int(sent[0]["status"])


@pytest.fixture(scope="module")
def routes() -> list[tuple[str, str]]:
    """Every method and path of the application that serves HTTP."""
    http_routes.install()
    every = [*http_server.app.routes, *v1_loads.router.routes, *elastic_ep.router.routes]
    found = [(m, r.path) for r in every for m in sorted(getattr(r, "methods", None) or ())]
    assert len(found) > 100
    return found


@pytest.mark.newest
def test_every_path_that_clients_may_call_exists(routes: list[tuple[str, str]]) -> None:
    """A new route of SGLang's is an operator's here until somebody has looked at it; one that is gone is noticed."""
    paths = {path for _, path in routes}
    # `/metrics` is mounted where metrics are enabled.
    assert PROBES - paths <= {"/metrics"}
    assert CLIENTS - paths == set()


@pytest.mark.parametrize("server", SERVERS)
def test_a_route_opens_for_whom_it_should(routes: list[tuple[str, str]], server: str) -> None:
    app, wrong = App(server), []
    for method, path in routes:
        for key in (None, "user", "boss", "wrong", ""):
            concrete = path.replace("{model:path}", "m").replace("{response_id}", "r")
            status = app.status(method, concrete, key)
            if (status == 200) != may(path, server, key) or status not in (200, 401):
                wrong.append(f"{method} {path} with {key!r}: {status}")
    assert wrong == []


def arguments(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"api_key": "user-key", "admin_api_key": "boss-user-key", **given})


def test_keys_are_cut_out_wherever_they_stand() -> None:
    told = {
        "api_key": "user-key",
        "admin_api_key": "boss-user-key",
        "launch_command": "--api-key=user-key --admin-api-key boss-user-key --port 1",
        "internal_states": [{"server_args": ("x", "user-key", 3)}],
    }
    ours = arguments(_whiflash=object())
    assert keys.without_keys(told, ours) == {
        "api_key": "<redacted>",
        "admin_api_key": "<redacted>",
        "launch_command": "--api-key=<redacted> --admin-api-key <redacted> --port 1",
        "internal_states": [{"server_args": ["x", "<redacted>", 3]}],
    }
    assert keys.without_keys(told, arguments()) is told, "not our server"
    assert keys.without_keys(told, arguments(_whiflash=object(), api_key=None, admin_api_key=None)) is told


def test_sglangs_log_would_tell_them() -> None:
    """Else there is nothing to cut out any more, and `engine/launch/keys.py` can go."""
    patching.install(keys)
    given = ServerArgs(model_path="unused", api_key="user-key", admin_api_key="boss-user-key")
    assert "user-key" in str(engine._server_args_for_logging.__wrapped__(given))
    assert "user-key" in str(engine._server_args_for_logging(given)), "not our server"
    given._whiflash = object()
    assert "user-key" not in str(engine._server_args_for_logging(given))

"""The middleware of all routes whose requests or answers carry fields of WHIFLASH.

SGLang's models drop fields that they do not know, and its answers have no place for ours. So the middleware reads our
fields of a body before the route does, and refuses wrong ones in the route's own form of an error.
`TokenizerManager.generate_request` takes them up (`routes`), and `writer` adds to the answer that the route sends.
Requests without our fields and their answers stay SGLang's own, and so do servers without WHIFLASH.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi.responses import JSONResponse, Response
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.utils import auth
from starlette.middleware import Middleware
from starlette.types import Message, Receive, Send
from whiflash_sdk.reading import TooDeepError, read_json

from whiflash_sglang.engine.carried import asks_for_ours, settings_of
from whiflash_sglang.engine.launch.keys import without_keys
from whiflash_sglang.http import sessions, writer
from whiflash_sglang.http.callers import CALLER, NOBODY, caller_of
from whiflash_sglang.http.reader import CURRENT, Call, Form, read
from whiflash_sglang.spans.hints import HintError

FORMS: Mapping[str, Form] = {
    os.environ.get("AIP_PREDICT_ROUTE", "/vertex_generate"): "native",  # SGLang's own route of this path wins
    "/v1/chat/completions": "chat",
    "/invocations": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/generate": "native",
}
OLLAMA = (
    os.environ.get("SGLANG_OLLAMA_CHAT_ROUTE", "/api/chat"),
    os.environ.get("SGLANG_OLLAMA_GENERATE_ROUTE", "/api/generate"),
)
"""Routes without fields of ours. They turn an error of `reader.take_up` into a 500, or a stream into a broken one."""
PROBES = ("/health", "/health_generate")
"""Routes on which the server asks itself for a token."""
INFO = ("/server_info", "/get_server_info")
"""Routes whose answers show SGLang's arguments."""


def install() -> None:
    """Add the middleware after all others of SGLang's application, so that API keys are checked first. Idempotent."""
    app = http_server.app
    if not any(entry.cls is HintsMiddleware for entry in app.user_middleware):
        app.user_middleware.append(Middleware(HintsMiddleware))
        app.middleware_stack = None  # it is built when the next request comes


class HintsMiddleware:
    """Reads our fields of a request before its route does, and has `writer` extend what the route sends."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if _is_foreign(scope):
            why = "pages of other origins may not steer a server without keys; send it from elsewhere, or set keys"
            await JSONResponse({"error": {"message": why}}, 403)(scope, receive, send)
            return
        manager = None if scope["type"] == "lifespan" else http_server._global_state.tokenizer_manager
        if manager is None or not asks_for_ours(manager.server_args):
            await self._app(scope, receive, send)
            return
        # A pipelined request starts in the context of the request before it, so both variables are set again.
        call, caller = CURRENT.set(None), CALLER.set(NOBODY)
        try:
            await self._serve(manager, scope, receive, send)
        finally:
            CURRENT.reset(call)
            CALLER.reset(caller)

    async def _serve(self, manager: Any, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        writes = scope.get("method") in ("POST", "PUT")
        form = FORMS.get(path) if writes else None
        try:
            caller = caller_of(scope.get("headers", ()), is_probe=path in PROBES)
            # Warm-ups come from SGLang itself. `reader.take_up` checks the requests of other routes.
            is_read = form is not None or (writes and path in OLLAMA)
            if is_read and manager.server_status != ServerStatus.Starting:
                caller.check_tenant(trusted=settings_of(manager.server_args).trust_tenant_header)
            CALLER.set(caller)
            if form is None:
                if path in (sessions.OPEN, sessions.CLOSE) and manager.server_args.enable_session_radix_cache:
                    trusted = settings_of(manager.server_args).trust_tenant_header
                    body, receive = await _parsed(receive)
                    if not isinstance(body, dict):
                        raise HintError("session_id", "is not in a JSON object; send one")
                    body = sessions.scoped_body(path, body, caller, trusted=trusted)
                    whole = {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
                    receive = _giving(whole, receive)
                if path in INFO:
                    send = writer.rewriting(send, lambda info: without_keys(info, manager.server_args))
            elif form == "native":
                CURRENT.set(Call(form))
            else:
                body, receive = await _parsed(receive)
                call = await read(form, body, manager)
                del body  # the call keeps what is needed of it while the answer is written
                CURRENT.set(call)
                send = writer.joining(call, writer.extending(call, send))
        except HintError as error:
            await _refusal(form, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_foreign(scope: Message) -> bool:
    """Whether a page of another origin sends this request, by a browser, to an operator's route of a server without
    keys. SGLang's CORS allows all origins."""
    headers = dict(scope.get("headers", ()))
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    same = (origin or b"").partition(b"://")[2] == headers.get(b"host")
    if site in (b"same-origin", b"none") or (site is None and (origin is None or same)):
        return False
    server_args = http_server._global_state.tokenizer_manager.server_args
    level = auth._get_auth_level_from_app_and_scope(http_server.app, dict(scope))
    is_open = not (server_args.api_key or server_args.admin_api_key)
    return bool(asks_for_ours(server_args) and is_open and level != auth.AuthLevel.NORMAL)


async def _parsed(receive: Receive) -> tuple[object, Receive]:
    """Return the parsed body, None if it is no JSON, and a `receive` that gives the body again, then later messages.
    Raises HintError if it nests too deep."""
    parts: list[bytes] = []
    message = await receive()
    while message["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            message = {"type": "http.request", "body": b"".join(parts), "more_body": False}
            break
        message = await receive()
    receive, body = _giving(message, receive), message.get("body", b"")
    for parse in (orjson.loads, read_json):  # SGLang's parser reads more than the first, such as UTF-16 and NaN
        try:
            return parse(body), receive
        except TooDeepError as error:
            raise HintError("body", str(error)) from None
        except ValueError:
            continue
    return None, receive


def _giving(message: Message, receive: Receive) -> Receive:
    """Return a `receive` that gives this message, then those of the given `receive`."""
    waiting = [message]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _refusal(form: Form | None, error: HintError) -> Response:
    """Return the error in the route's own form."""
    state = http_server.app.state
    if form in (None, "native"):
        return JSONResponse({"error": {"message": str(error)}}, 400)
    if form == "messages":
        return state.anthropic_serving._error_response(400, "invalid_request_error", str(error))
    serving = state.openai_serving_responses if form == "responses" else state.openai_serving_chat
    return serving.create_error_response(str(error), param=error.field)


def routes() -> tuple[str, ...]:
    """Return the routes below `/v1` whose requests may carry hints. SGLang's application may serve no Responses."""
    responses = ("responses",) if hasattr(http_server.app.state, "openai_serving_responses") else ()
    return "chat/completions", "completions", "messages", *responses

"""Install WHIFLASH's patches and middleware in SGLang's HTTP process, and add its routes."""

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Query, Request
from fastapi.responses import JSONResponse
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput, SetInternalStateReq
from whiflash_sdk.hints import MAX_BYTES, MAX_MARKER_CHARS, MAX_NAME_CHARS, MAX_SPANS, WIRE_VERSION

from whiflash_sglang import __version__
from whiflash_sglang.copying.tenants import parse_forget
from whiflash_sglang.engine import patching
from whiflash_sglang.engine.carried import asks_for_ours, replace_settings, settings_of
from whiflash_sglang.engine.launch.refusals import storage_refusal
from whiflash_sglang.engine.patching import around
from whiflash_sglang.engine.scheduler import figures
from whiflash_sglang.engine.scheduler.control import encode, encode_forget, states_of
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.hosts import SilentReplicaError, together
from whiflash_sglang.files.jsonl import read_json
from whiflash_sglang.http import admission, callers, cut_streams, middleware, reader, sessions, traces, writer
from whiflash_sglang.http.previews import serves_previews
from whiflash_sglang.settings.config import PolicyChange, changed
from whiflash_sglang.telemetry.samples import forget_samples

logger = logging.getLogger("whiflash_sglang")


def install() -> None:
    """Install patches, middleware and routes in a process that serves HTTP (launcher, tokenizer worker). Idempotent."""
    writer.allow_extensions()
    callers.drop_trailers()
    patching.install(admission, figures, sys.modules[__name__], traces, writer)
    middleware.install()
    if "/whiflash/capabilities" not in {getattr(route, "path", None) for route in http_server.app.routes}:
        http_server.app.get("/whiflash/capabilities")(_capabilities)
        # With --admin-api-key only its holder may call these, as with SGLang's own /set_internal_state. Two readings
        # of the state reveal how many drafts were accepted in between.
        admin_only = http_server.auth_level(http_server.AuthLevel.ADMIN_OPTIONAL)
        http_server.app.get("/whiflash/state")(admin_only(_state))
        for name, change in (("policy", _set_policy), ("forget", _forget)):
            http_server.app.post(f"/whiflash/{name}", name=change.__name__, description=change.__doc__)(
                admin_only(_steering(name, change))
            )


@around(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.generate_request",
    params=("obj", "request"),
    why="all requests and outputs pass here; readers of streams want one token an output (sglang #31915, #37634)",
    until="SGLang lets algorithms see requests, and its parsers read outputs of several tokens",
)
async def _generate_request(original: Any, self: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
    """Check a request and carry its hints to the scheduler, add traces to its outputs, and cut them for parsers."""
    outputs, call = original(self, obj, request), reader.CURRENT.get()
    if asks_for_ours(self.server_args):
        fields = await reader.take_up(self, obj, call)
        admission.check_given(obj, native=call is not None and call.form == "native")
        outputs = traces.followed(self, obj, call, fields, outputs)
        if (cuts := cut_streams.cuts_of(self, obj, call)) is not None:
            outputs = cut_streams.cut(self, obj, call, outputs, cuts)
    async for output in outputs:
        yield output


@around(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.attach_hicache_storage",
    params=("hicache_storage_backend",),
    why="SGLang attaches any storage while it serves",
    until="SGLang judges what is attached as it does a launch",
)
async def _attach_storage(original: Any, self: Any, hicache_storage_backend: str, *args: Any, **named: Any) -> Any:
    """Refuse to attach storage to a running server if a launch with it would be refused."""
    if asks_for_ours(self.server_args):
        why = storage_refusal(self.server_args, hicache_storage_backend, bool(settings_of(self.server_args).drafters))
        if why is not None:
            return AttachHiCacheStorageReqOutput(success=False, message=why)
    return await original(self, hicache_storage_backend, *args, **named)


async def _capabilities() -> dict[str, object]:
    manager = http_server._global_state.tokenizer_manager
    server_args = manager.server_args
    settings = settings_of(server_args)
    others = {"uno": settings.uno, "structure": settings.structure.enabled, "lookup": settings.lookup.enabled}
    return {
        "version": WIRE_VERSION,
        "server_version": __version__,
        "model": server_args.served_model_name or server_args.model_path,
        "policy": await _policy(manager),
        "arms": [*settings.drafters, *(arm for arm, loaded in others.items() if loaded), "none"],
        "routes": middleware.routes(),
        "prediction_tokens": settings.lookup.prediction_tokens if settings.lookup.enabled else 0,
        "tool_call_parser": manager.config_value("tool_call_parser"),
        "reasoning_parser": manager.config_value("reasoning_parser"),
        "tenant_header": settings.trust_tenant_header,
        "sessions": sessions.serves_sessions(server_args),
        "previews": serves_previews(server_args),
        "limits": {
            "spans": MAX_SPANS,
            "marker_chars": MAX_MARKER_CHARS,
            "name_chars": MAX_NAME_CHARS,
            "bytes": MAX_BYTES,
        },
    }


async def _policy(manager: Any) -> str:
    """Return the policy in force. With several tokenizer workers the schedulers are asked, since another may have
    changed it."""
    if manager.server_args.tokenizer_worker_num > 1:
        with contextlib.suppress(SilentReplicaError):
            return str(together(await _states())["policy"])
    return settings_of(manager.server_args).router


Seconds = Annotated[float | None, Query(gt=0, allow_inf_nan=False)]


async def _state(timeout: Seconds = None) -> JSONResponse:
    """Return the policy in force, running requests, and where the rounds' time went, of each replica and together.

    Args:
        timeout: seconds to wait for a replica; by default, how long a step may last before SGLang ends the server.
    """
    return await _answered(_together(timeout))


async def _together(timeout: float | None = None) -> dict[str, Any]:
    return together(await _states(timeout))


async def _states(timeout: float | None = None) -> list[dict[str, Any]]:
    manager = http_server._global_state.tokenizer_manager
    return await states_of(manager, timeout or manager.config_value("watchdog_timeout"))


async def _object(request: Request) -> dict[str, Any]:
    """Return the JSON object of a request's body. SGLang's own error for another body would name a file of the server.

    Raises:
        HTTPException: the body is no JSON object. Browsers send other content types to other origins without asking.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    with contextlib.suppress(ValueError):
        if kind == "application/json" and isinstance(body := read_json(await request.body()), dict):
            return body
    raise HTTPException(400, "the body is no JSON object, or its content-type does not call it JSON")


Body = Annotated[dict[str, Any], Depends(_object)]
Change = Callable[[dict[str, Any], dict[str, Any]], Awaitable[dict[str, Any]]]
"""Applies a body's change, enters what may be logged in its second argument, and returns the new state. A ConfigError
is answered with 400."""


def _steering(name: str, change: Change) -> Callable[..., Awaitable[JSONResponse]]:
    """Return the route of a change, which answers with the state afterwards and writes a line to the log."""

    async def steer(body: Body, request: Request) -> JSONResponse:
        logged: dict[str, Any] = {}
        answer = await _answered(change(body, logged))
        # If a gateway is in front of this server, this is the gateway's address.
        client = request.client.host if request.client else None
        done = "done" if answer.status_code == 200 else f"refused with {answer.status_code}"
        logger.info("control: %s %s, from %s: %s", name, json.dumps(logged), client or "nowhere", done)
        return answer

    return steer


async def _set_policy(change: dict[str, Any], logged: dict[str, Any]) -> dict[str, Any]:
    """Change router, thresholds or dwell while serving."""
    known = {name: change[name] for name in PolicyChange.model_fields if name in change}
    scalar = (bool, int, float, str, type(None))  # a long value is not logged
    logged.update({n: v if isinstance(v, scalar) and len(repr(v)) <= 32 else "..." for n, v in known.items()})
    server_args = http_server._global_state.tokenizer_manager.server_args
    settings = changed(settings_of(server_args), change)
    state = await _send(encode(change))
    replace_settings(server_args, settings)
    return state


async def _forget(who: dict[str, Any], logged: dict[str, Any]) -> dict[str, Any]:
    """Drop samples of one tenant, or of all, and reset the learned rates of copies and forced text for all."""
    handle = parse_forget(who)
    # The log gets a hash of the tenant's keys: whoever has the keys is the tenant.
    logged.update({"all": True} if handle is None else {"tenant": f"{handle:016x}"})
    state = await _send(encode_forget(handle))
    directory = settings_of(http_server._global_state.tokenizer_manager.server_args).samples.directory
    if directory is not None:  # the schedulers have dropped the samples that they had in memory
        try:
            await asyncio.to_thread(forget_samples, directory, handle)
        except OSError as error:
            why = f"samples in {directory} were not dropped: {error.strerror}"
            raise _FailedError(500, "InternalServerError", why) from None
    return state


async def _send(change: dict[str, Any]) -> dict[str, Any]:
    """Send an encoded change to every scheduler and return the state afterwards. If one is silent, none changes."""
    try:
        await _states()
    except SilentReplicaError as error:
        raise _FailedError(504, "GatewayTimeout", f"nothing was changed: {error}") from None
    request = SetInternalStateReq(server_args=change)
    if not all(await http_server._global_state.tokenizer_manager.set_internal_state(request)):
        raise ConfigError("the change was refused; the server's log says why")
    return await _together()


class _FailedError(Exception):
    """An HTTP error: its status, its type by SGLang's names, and its message."""


async def _answered(state: Awaitable[dict[str, Any]]) -> JSONResponse:
    """Return a response with the state, or with the error that prevented it."""
    try:
        return JSONResponse(await state)
    except ConfigError as error:
        status, kind, message = 400, "BadRequestError", str(error)
    except SilentReplicaError as error:
        status, kind, message = 504, "GatewayTimeout", str(error)
    except _FailedError as error:
        status, kind, message = error.args
    return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status)

"""What WHIFLASH adds to SGLang's HTTP process: hint validation, the trace, and the capabilities route."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import wraps
from typing import Any

from fastapi.responses import JSONResponse
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.openai import protocol
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from whiflash_sdk.hints import Hints, Span

from whiflash_sglang import __version__
from whiflash_sglang.compat.carried import replace_settings, settings_of
from whiflash_sglang.compat.control import KEY, encode, encode_forget
from whiflash_sglang.compat.patching import replace
from whiflash_sglang.compat.streamer import META_KEY
from whiflash_sglang.config import changed
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lookup.forget import parse_forget
from whiflash_sglang.spans.hints import (
    HintError,
    RequestHints,
    SpanHint,
    capabilities,
    validate_custom_params,
)
from whiflash_sglang.spans.infer import infer_spans
from whiflash_sglang.spans.vocabulary import token_bytes
from whiflash_sglang.trace import build_trace, pieces_of

_RESPONSES = (
    "ChatCompletionResponse",
    "ChatCompletionStreamResponse",
    "CompletionResponse",
    "CompletionStreamResponse",
)


def install(server_args: Any) -> None:
    """Idempotent. Only the launcher's process serves HTTP, so only there this is called."""
    _open_extension()
    replace(TokenizerManager, "generate_request", _tracing)
    for serving, build, stream in (
        (OpenAIServingChat, "_build_chat_response", "_generate_chat_stream"),
        (OpenAIServingCompletion, "_build_completion_response", "_generate_completion_stream"),
    ):
        replace(serving, "_validate_request", _validating)
        replace(serving, build, _with_trace)
        replace(serving, stream, _with_trace_chunk)
    known = {getattr(route, "path", None) for route in http_server.app.routes}
    if "/whiflash/capabilities" not in known:
        http_server.app.get("/whiflash/capabilities")(_capabilities_of(server_args))
        http_server.app.get("/whiflash/state")(_state)
        # As SGLang's own /set_internal_state: with --admin-api-key, only for its holder.
        admin_only = http_server.auth_level(http_server.AuthLevel.ADMIN_OPTIONAL)
        http_server.app.post("/whiflash/policy")(admin_only(_set_policy))
        http_server.app.post("/whiflash/forget")(admin_only(_forget))


def _open_extension() -> None:
    """Let `sglext` carry a field of ours; the responses around it are rebuilt since they embed its schema."""
    if protocol.SglExt.model_config.get("extra") == "allow":
        return
    protocol.SglExt.model_config["extra"] = "allow"
    protocol.SglExt.model_rebuild(force=True)
    for name in _RESPONSES:
        getattr(protocol, name).model_rebuild(force=True)


def _validating(original: Any) -> Any:
    """Refuse malformed hints before anything is scheduled; add the spans that the request itself implies."""

    @wraps(original)
    def validate(self: Any, request: Any) -> str | None:
        try:
            hints = validate_custom_params(request.custom_params)
        except HintError as error:
            return str(error)
        if hints.infer and not hints.spans:
            inferred = _inferred(self.tokenizer_manager.server_args, request)
            if inferred.spans:
                wire = Hints(
                    trace=hints.trace,
                    off=hints.off,
                    lookup=hints.lookup,
                    spans=tuple(Span(**_span_fields(s)) for s in inferred.spans),
                )
                request.custom_params = {**(request.custom_params or {}), **wire.custom_params()}
        result: str | None = original(self, request)
        return result

    return validate


def _span_fields(span: SpanHint) -> dict[str, Any]:
    return {"kind": span.kind, "begin": span.begin, "end": span.end, "open": span.open}


def _inferred(server_args: Any, request: Any) -> RequestHints:
    choice = getattr(request, "tool_choice", None)
    response_format = getattr(request, "response_format", None)
    return infer_spans(
        server_args.tool_call_parser,
        server_args.reasoning_parser,
        bool(getattr(request, "tools", None)) and choice != "none",
        getattr(response_format, "type", None),
        choice == "required" or not isinstance(choice, (str, type(None))),
    )


def _tracing(original: Any) -> Any:
    """Turn the rounds that arrive with a finished answer into its trace; hide them before that."""

    @wraps(original)
    async def generate_request(self: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        _validate_native(obj)
        async for output in original(self, obj, request):
            for choice, item in enumerate(output if isinstance(output, list) else [output]):
                _finish_trace(self, obj, item, choice)
            yield output

    return generate_request


def _validate_native(obj: Any) -> None:
    """The native route hands its parameters on unseen; SGLang answers a ValueError with 400."""
    params = getattr(obj, "sampling_params", None)
    for entry in params if isinstance(params, list) else [params]:
        if isinstance(entry, dict) and entry.get("custom_params") is not None:
            try:
                validate_custom_params(entry["custom_params"])
            except HintError as error:
                raise ValueError(str(error)) from None


def _finish_trace(manager: Any, obj: Any, item: Any, choice: int) -> None:
    meta = item.get("meta_info") if isinstance(item, dict) else None
    if not isinstance(meta, dict) or META_KEY not in meta:
        return
    rounds = meta.pop(META_KEY)
    if meta.get("finish_reason") is None:
        return
    index = item.get("index", choice)
    tokens = list(item.get("output_ids") or ())
    whole = len(tokens) == meta["completion_tokens"] and manager.tokenizer is not None
    text_of = pieces_of(tokens, _vocabulary(manager)) if whole else None

    policy = settings_of(manager.server_args).router
    meta[META_KEY] = build_trace(rounds, policy, meta["completion_tokens"], choice=index, text_of=text_of)
    traces = getattr(obj, "_whiflash_traces", None)
    if traces is None:
        traces = obj._whiflash_traces = []
    traces.append(meta[META_KEY])


def _vocabulary(manager: Any) -> Sequence[bytes]:
    """Bytes of every token; built at the first traced answer."""
    found: Sequence[bytes] | None = getattr(manager, "_whiflash_vocabulary", None)
    if found is None:
        found = manager._whiflash_vocabulary = token_bytes(manager.tokenizer)
    return found


def _with_trace(original: Any) -> Any:
    @wraps(original)
    def build(self: Any, request: Any, ret: list[dict[str, Any]], *rest: Any, **named: Any) -> Any:
        response = original(self, request, ret, *rest, **named)
        traces = [item["meta_info"][META_KEY] for item in ret if META_KEY in item["meta_info"]]
        if traces and hasattr(response, "sglext"):
            extension = response.sglext or protocol.SglExt()
            setattr(extension, META_KEY, traces[0] if len(traces) == 1 else traces)
            response.sglext = extension
        return response

    return build


def _with_trace_chunk(original: Any) -> Any:
    @wraps(original)
    async def stream(self: Any, adapted: Any, request: Any, *rest: Any, **named: Any) -> AsyncIterator[str]:
        async for line in original(self, adapted, request, *rest, **named):
            traces = getattr(adapted, "_whiflash_traces", None)
            if traces and line.startswith("data: [DONE]"):
                yield f"data: {json.dumps(_trace_chunk(request, traces))}\n\n"
            yield line

    return stream


def _trace_chunk(request: Any, traces: list[dict[str, Any]]) -> dict[str, Any]:
    """A last chunk without choices, as SGLang's own extension chunks are."""
    kind = "chat.completion.chunk" if hasattr(request, "messages") else "text_completion"
    return {
        "id": "whiflash-trace",
        "object": kind,
        "created": 0,
        "model": request.model,
        "choices": [],
        "sglext": {META_KEY: traces[0] if len(traces) == 1 else traces},
    }


def _capabilities_of(server_args: Any) -> Any:
    async def get_capabilities() -> dict[str, object]:
        settings = settings_of(server_args)
        return capabilities(
            server_version=__version__,
            model=server_args.served_model_name or server_args.model_path,
            policy=settings.router,
            arms=("ar", "diffusion", *(("lookup",) if settings.lookup.enabled else ()), "none"),
            tool_call_parser=server_args.tool_call_parser,
            reasoning_parser=server_args.reasoning_parser,
        )

    return get_capabilities


async def _state() -> JSONResponse:
    """Policy in force, running requests, and where the rounds' time went."""
    states = await http_server._global_state.tokenizer_manager.get_internal_state()
    return JSONResponse(states[0][KEY])


async def _set_policy(change: dict[str, Any]) -> JSONResponse:
    """Change router, thresholds or dwell while serving."""
    manager = http_server._global_state.tokenizer_manager
    settings = settings_of(manager.server_args)
    try:
        settings = changed(settings, change)
    except ConfigError as error:
        return _bad_request(str(error))
    answer = await _send(encode(change))
    if answer.status_code == 200:
        replace_settings(manager.server_args, settings)
    return answer


async def _forget(who: dict[str, Any]) -> JSONResponse:
    """Drop what the copying arm remembers of one tenant's outputs, or of everybody's."""
    try:
        tenant = parse_forget(who)
    except ConfigError as error:
        return _bad_request(str(error))
    return await _send(encode_forget(tenant))


async def _send(message: Mapping[str, float]) -> JSONResponse:
    """Tell every scheduler; the state afterwards."""
    manager = http_server._global_state.tokenizer_manager
    answers = await manager.set_internal_state(SetInternalStateReq(server_args=dict(message)))
    if not all(answers):
        return _bad_request("the change was refused; the server's log says why")
    return await _state()


def _bad_request(message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "BadRequestError"}}, status_code=400)

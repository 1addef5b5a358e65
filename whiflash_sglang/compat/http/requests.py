"""What requests say to WHIFLASH: read from their bodies, checked before anything is scheduled, and completed by what
they imply. In the process that serves HTTP.
"""

from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.tokenizer_manager import ServerStatus
from whiflash_sdk.hints import INFERRED_KEY, WIRE_KEY, Span
from whiflash_sdk.presets import likely_spans

from whiflash_sglang.compat.carried import asks_for_ours, settings_of
from whiflash_sglang.compat.patching import around
from whiflash_sglang.spans.carrier import Own, add_hints, as_carried, validate_custom_params
from whiflash_sglang.spans.forced import check_forced
from whiflash_sglang.spans.hints import TOOLS_KEY, HintError
from whiflash_sglang.spans.prediction import FIELD, add_body_prediction, carried_prediction
from whiflash_sglang.structure.tools import carried_tools


def check_native(manager: Any, obj: Any) -> None:
    """Of the native route, which hands its parameters on unseen.

    Raises:
        ValueError: they are malformed; SGLang answers it with 400.
    """
    params = getattr(obj, "sampling_params", None)
    if isinstance(params, list):
        obj.sampling_params = [_carried(manager, entry) for entry in params]
    elif params is not None:
        obj.sampling_params = _carried(manager, params)


def keep_from_learning(manager: Any, obj: Any) -> None:
    """A health check, and whatever comes before the server is up, its warm-up, are nobody's text: no samples."""
    params, rid = getattr(obj, "sampling_params", None), getattr(obj, "rid", None)
    own = isinstance(rid, str) and rid.startswith(HEALTH_CHECK_RID_PREFIX)
    if not own and manager.server_status != ServerStatus.Starting:
        return
    if settings_of(manager.server_args).samples.directory is not None:
        several = isinstance(params, list)
        entries: list[Any] = params if several else [params]  # type: ignore[assignment]
        marked = [_marked(entry or {}) for entry in entries]
        obj.sampling_params = marked if several else marked[0]


def _marked(params: dict[str, Any]) -> dict[str, Any]:
    given = params.get("custom_params")
    return {**params, "custom_params": add_hints(given, {"learn": False}) or {WIRE_KEY: '{"learn": false}'}}


def _carried(manager: Any, params: Any) -> Any:
    """One request's parameters as SGLang can send them. The given ones stay: SGLang may serve them again."""
    custom_params = params.get("custom_params") if isinstance(params, dict) else None
    if custom_params is None:
        return params
    try:
        validate_custom_params(custom_params)
        _check_long(manager, custom_params)
        return {**params, "custom_params": as_carried(custom_params)}
    except HintError as error:
        raise ValueError(str(error)) from None


@around(
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat.handle_request",
    "sglang.srt.entrypoints.openai.serving_completions:OpenAIServingCompletion.handle_request",
    params=("request", "raw_request"),
    why="SGLang's models drop fields that they do not know",
    until="SGLang keeps them",
)
async def _reading_body(original: Any, self: Any, request: Any, raw_request: Any) -> Any:
    """SGLang's models drop fields that they do not know: ours are read from the body, which is parsed already."""
    if asks_for_ours(self.tokenizer_manager.server_args):
        try:
            request.custom_params = from_body(request.custom_params, await _body_of(raw_request))
        except HintError as error:
            return self.create_error_response(str(error), param=error.field)
    return await original(self, request, raw_request)


async def _body_of(raw_request: Any) -> object:
    """The parsed body of a request; none of what came over gRPC, which hands on SGLang's own fields only."""
    return await raw_request.json() if hasattr(raw_request, "json") else {}


def from_body(custom_params: dict[str, Any] | None, body: object) -> dict[str, Any] | None:
    """`custom_params` with what the fields of a request's body say. Raises HintError."""
    return add_body_prediction(custom_params, body)


@around(
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._validate_request",
    "sglang.srt.entrypoints.openai.serving_completions:OpenAIServingCompletion._validate_request",
    params=("request",),
    why="SGLang checks nothing in `custom_params`",
    until="SGLang lets algorithms validate requests",
)
def _validating(original: Any, self: Any, request: Any) -> str | None:
    """Hints are checked, and completed by what a request implies."""
    if asks_for_ours(self.tokenizer_manager.server_args):
        try:
            request.custom_params = completed(self.tokenizer_manager, request, request.custom_params)
        except HintError as error:
            return str(error)
    result: str | None = original(self, request)
    return result


def completed(manager: Any, request: Any, custom_params: Any) -> Any:
    """`custom_params` with the spans and the tools that the request implies; `request`: in the form of a chat's.

    Raises: HintError where they are malformed.
    """
    hints = validate_custom_params(custom_params)
    _check_long(manager, custom_params)
    if not hints.infer:
        return custom_params
    if not hints.spans and (spans := _inferred(manager, request)):
        told = add_hints(custom_params, {"spans": [span.model_dump(exclude_defaults=True) for span in spans]})
        custom_params = custom_params if told is None else {**told, INFERRED_KEY: True}
    tools = _tools(manager, request)
    return custom_params if tools is None else {**(custom_params or {}), TOOLS_KEY: Own(tools)}


def _check_long(manager: Any, custom_params: Any) -> None:
    """What of a request's parameters may be long: the form of a prediction, and a forced answer. Raises HintError."""
    if isinstance(carried_prediction(custom_params), str) and manager.tokenizer is None:
        raise HintError(FIELD, "must be token ids: this server has no tokenizer")
    allowed = settings_of(manager.server_args).force_recorded
    check_forced(custom_params, manager.model_config.vocab_size, allowed=allowed)


def _tools(manager: Any, request: Any) -> str | None:
    """Which tools may be called, where the scheduler may draft calls of them."""
    choice, tools = getattr(request, "tool_choice", None), getattr(request, "tools", None)
    if not tools or choice == "none" or not settings_of(manager.server_args).structure.enabled:
        return None
    named = getattr(getattr(choice, "function", None), "name", None)
    functions = [tool.function for tool in tools if named in (None, tool.function.name)]
    return carried_tools(
        [(function.name, function.parameters) for function in functions],
        manager.config_value("tool_call_parser"),
    )


def _inferred(manager: Any, request: Any) -> tuple[Span, ...]:
    choice = getattr(request, "tool_choice", None)
    response_format = getattr(request, "response_format", None)
    return likely_spans(
        tool_parser=manager.config_value("tool_call_parser"),  # `auto` has become a name here, or None
        reasoning_parser=manager.config_value("reasoning_parser"),
        has_tools=bool(getattr(request, "tools", None)) and choice != "none",
        response_format=getattr(response_format, "type", None),
        forced=choice == "required" or not isinstance(choice, (str, type(None))),
        prefill=_prefill(request),
    )


def _prefill(request: Any) -> str:
    """The answer's beginning in a chat that goes on with its last message."""
    last = request.messages[-1] if getattr(request, "continue_final_message", False) else None
    content = getattr(last, "content", None)
    return content if isinstance(content, str) and getattr(last, "role", None) == "assistant" else ""

"""Parameters of requests for WHIFLASH: read from their bodies, checked before anything is scheduled, and completed by
what they imply. In the process that serves HTTP.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.entrypoints.openai.responses_adapters import custom_tool_parameters
from sglang.srt.managers.tokenizer_manager import ServerStatus
from whiflash_sdk.hints import INFERRED_KEY, WIRE_KEY, Span
from whiflash_sdk.presets import likely_spans

from whiflash_sglang.engine.carried import settings_of
from whiflash_sglang.engine.http.call import Call, Form
from whiflash_sglang.spans.carrier import Own, add_hints, as_carried, validate_custom_params
from whiflash_sglang.spans.forced import check_forced
from whiflash_sglang.spans.hints import TOOLS_KEY, HintError, parse_hints
from whiflash_sglang.spans.prediction import FIELD, add_body_prediction, carried_prediction
from whiflash_sglang.structure.tools import carried_tools


def check_native(manager: Any, obj: Any) -> None:
    """Check a request of the native route, which hands its parameters on unseen.

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


def read(form: Form, body: object, manager: Any) -> Call:
    """A request of a route that SGLang converts, by its body.

    Raises:
        HintError: naming the field that is wrong.
    """
    if not isinstance(body, dict):  # SGLang refuses it
        return Call(form)
    params = body.get("custom_params")
    if params is not None and not isinstance(params, dict):
        raise HintError("custom_params", "must be an object")
    if not isinstance(body.get("response_format") or {}, dict):  # SGLang answers with 500
        raise HintError("response_format", "must be an object")
    params = add_body_prediction(params, body)
    validate_custom_params(params)
    _check_long(manager, params)
    return Call(form, _without_texts(body), params, _keys(body) if form == "messages" else {})


def _without_texts(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are asked for later: SGLang has prompts of its own, and those of many requests are long."""
    kept = {name: value for name, value in body.items() if name not in _TEXTS}
    messages = kept.get("messages")
    if isinstance(messages, list):
        with_tools = [
            message for message in messages[:-1] if isinstance(message, dict) and message.get("tools")
        ]
        kept["messages"] = [*with_tools, *messages[-1:]]
    return kept


def _keys(body: Mapping[str, Any]) -> dict[str, str]:
    keys = {name: body[name] for name in ("cache_salt", "extra_key") if body.get(name) is not None}
    for name, value in keys.items():
        if not isinstance(value, str):
            raise HintError(name, "must be text")
    return keys


def fill(manager: Any, obj: Any, call: Call) -> None:
    """Put what a call carries, and what it implies, into the internal request that SGLang has made of it."""
    params = implied(manager, as_chat(call), call.params)
    if params is not None:  # SGLang may have put keys of its own there while it converted the request
        known = obj.sampling_params.get("custom_params") or {}
        obj.sampling_params = {**obj.sampling_params, "custom_params": {**known, **params}}
    for name, value in call.keys.items():
        setattr(obj, name, value)


def as_chat(call: Call) -> SimpleNamespace:
    """The parts of an accepted request that imply spans and calls, in the form of SGLang's chat requests."""
    body, choice = call.body, call.body.get("tool_choice")
    tools: list[tuple[str, Any]] = []
    expected = body.get("response_format")
    if call.form == "responses":
        tools = [
            (tool["name"], custom_tool_parameters() if tool["type"] == "custom" else tool.get("parameters"))
            for tool in _tools_of(body, "name")
            if tool.get("type") in _CALLED
        ]
        if isinstance(choice, dict):
            choice = _named(choice) if choice.get("type") in _CALLED else "auto"
        choice = choice if tools else "none"
        expected = (body.get("text") or {}).get("format")
    elif call.form == "messages":
        tools = [
            (tool["name"], tool["input_schema"])
            for tool in _tools_of(body, "input_schema")
            if tool.get("type") in (None, "custom") and tool.get("name")
        ]
        if isinstance(choice, dict):
            wanted = str(choice.get("type"))
            choice = _named(choice) if wanted == "tool" else {"any": "required"}.get(wanted, wanted)
        expected = (body.get("output_config") or {}).get("format") and {"type": "json_schema"}
    elif call.form == "chat":
        functions = [tool["function"] for tool in _tools_of(body, "function")]
        tools = [(function["name"], function.get("parameters")) for function in functions]
        choice = _named(choice) if isinstance(choice, dict) else choice
    last = body["messages"][-1:] if call.form == "chat" and body.get("continue_final_message") else []
    return SimpleNamespace(
        tools=[SimpleNamespace(function=SimpleNamespace(name=name, parameters=p)) for name, p in tools],
        tool_choice=choice,
        response_format=SimpleNamespace(type=expected.get("type")) if isinstance(expected, dict) else None,
        continue_final_message=bool(last),
        messages=[
            SimpleNamespace(role=message.get("role"), content=message.get("content")) for message in last
        ],
        _response_parser_json_response_format=False,
    )


_TEXTS = ("prompt", "input", "instructions", "system", "prediction")
_CALLED = ("function", "custom")
"""Types of Responses' tools that a model calls; SGLang has others."""


def _tools_of(body: Mapping[str, Any], part: str) -> list[Any]:
    """Tools that have this part."""
    return [tool for tool in body.get("tools") or () if isinstance(tool, dict) and tool.get(part) is not None]


def _named(choice: Mapping[str, Any]) -> Any:
    """A choice of one tool."""
    name = choice.get("name") or (choice.get("function") or {}).get("name")
    return SimpleNamespace(function=SimpleNamespace(name=name)) if name else "auto"


def implied(manager: Any, request: Any, custom_params: Any) -> Any:
    """`custom_params`, which are valid, with the spans and the tools that the request implies.

    request: in the form of a chat's.
    """
    hints = parse_hints(custom_params)
    if not hints.infer:
        return custom_params
    if not hints.spans and (spans := _inferred(manager, request)):
        told = add_hints(custom_params, {"spans": [span.model_dump(exclude_defaults=True) for span in spans]})
        custom_params = custom_params if told is None else {**told, INFERRED_KEY: True}
    tools = _tools(manager, request)
    return custom_params if tools is None else {**(custom_params or {}), TOOLS_KEY: Own(tools)}


def _check_long(manager: Any, custom_params: Any) -> None:
    """Check parameters that may be long: the form of a prediction, and a forced answer. Raises HintError."""
    if isinstance(carried_prediction(custom_params), str) and manager.tokenizer is None:
        raise HintError(FIELD, "must be token ids: this server has no tokenizer")
    allowed = settings_of(manager.server_args).force_recorded
    check_forced(custom_params, manager.model_config.vocab_size, allowed=allowed)


def _tools(manager: Any, request: Any) -> str | None:
    """Tools that may be called, if the scheduler may draft calls of them."""
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

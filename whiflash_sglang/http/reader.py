"""Read and check once, before scheduling, what a request says to WHIFLASH: hints, a prediction, a forced answer, its
tenant. Runs in the process that serves HTTP.

Requests of routes that SGLang converts are read from their bodies (`read`), before SGLang drops fields that it does not
know, and get the spans and tools that they imply. Others are read from their sampling parameters (`take_up`).
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.entrypoints.openai.responses_adapters import custom_tool_parameters
from sglang.srt.managers.tokenizer_manager import ServerStatus
from whiflash_sdk.hints import INFERRED_KEY, WIRE_KEY, Span
from whiflash_sdk.presets import likely_spans

from whiflash_sglang.engine.carried import settings_of
from whiflash_sglang.http.callers import CALLER
from whiflash_sglang.spans.carrier import add_hints, validate_custom_params
from whiflash_sglang.spans.forced import check_forced
from whiflash_sglang.spans.hints import CARRIED_PREDICTION, TOOLS_KEY, HintError, RequestHints
from whiflash_sglang.spans.prediction import body_prediction, prediction_reader
from whiflash_sglang.structure.tools import carried_tools

T = TypeVar("T")
Form = Literal["chat", "completion", "responses", "messages", "native"]
"""The API by whose schema a request is written. A native request has `sampling_params`, which carry its hints."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The hints and the prediction that one set of sampling parameters carries.

    params: its `custom_params`, with additions from other fields and a prediction as token ids; None without any.
    notes: remarks on the prediction, for the traces of its choices.
    """

    params: dict[str, Any] | None = None
    hints: RequestHints = field(default_factory=RequestHints)
    notes: tuple[str, ...] = ()

    @property
    def prediction(self) -> Sequence[int] | None:
        """Return the token ids that the client predicts as the answer; None without a prediction."""
        return (self.params or {}).get(CARRIED_PREDICTION)


@dataclass(slots=True)
class Call:
    """One request of a route in `middleware.FORMS`, until its answer is sent.

    body: as SGLang parses it, without its texts. It is empty, and `asked` is None, if the request is native or SGLang
    will refuse it. keys: `cache_salt` and `extra_key` of Messages, since SGLang's model has no field for them.
    """

    form: Form
    body: Mapping[str, Any] = field(default_factory=dict)
    asked: Asked | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    # Filled by `generate_request` while outputs pass:
    traces: list[tuple[dict[str, Any], str | None]] = field(default_factory=list)
    """Traces of choices that have ended, each with the text that its offsets refer to."""
    counts: dict[int, dict[str, int]] = field(default_factory=dict)
    """Numbers of accepted and rejected tokens of its prediction, by choice."""


CURRENT: ContextVar[Call | None] = ContextVar("whiflash_call", default=None)
"""The call of the current request; None on other routes, over gRPC and in an `Engine`."""


def parameters_of(obj: Any) -> list[Any]:
    """Return the sampling parameters of SGLang's internal request: one set for all prompts, or one for each."""
    given = getattr(obj, "sampling_params", None)
    return given if isinstance(given, list) else [given]


def of_choice(values: Sequence[T], obj: Any, choice: int) -> T:
    """Return the value for the prompt that `choice` answers: SGLang numbers the choices of a batch prompt by prompt.

    values: one for all prompts, or one for each, repeated or not.
    """
    return values[choice // getattr(obj, "parallel_sample_num", 1)] if len(values) > 1 else values[0]


async def read(form: Form, body: object, manager: Any) -> Call:
    """Read and check the body of a request of a route that SGLang converts.

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
    if (text := body_prediction(body)) is not None:
        if CARRIED_PREDICTION in (params or {}):
            why = f"given twice, also as custom_params.{CARRIED_PREDICTION}; give one of them"
            raise HintError("prediction", why)
        params = {**(params or {}), CARRIED_PREDICTION: text}
    asked = await asked_by(manager, params)
    if body.get("previous_response_id") is not None:  # an earlier turn may have opted out of learning
        asked = _unlearned(asked)
    return Call(form, _without_texts(body), asked, _keys(body) if form == "messages" else {})


async def take_up(manager: Any, obj: Any, call: Call | None) -> list[Asked]:
    """Return what SGLang's internal request `obj` asks for: one record for all prompts, or one for each. Its sampling
    parameters are replaced by those for the scheduler; the given objects stay unchanged, since SGLang may serve them
    again. A trusted header's tenant replaces the request's own.

    call: the request's call, or None. If no body was read, the sampling parameters are checked here.

    Raises:
        HintError: parameters are malformed, or no header names the tenant; SGLang answers it with 400.
    """
    caller, settings = CALLER.get(), settings_of(manager.server_args)
    is_warm_up = manager.server_status == ServerStatus.Starting
    keys: Mapping[str, str | None] = call.keys if call is not None else {}
    if not is_warm_up:
        caller.check_tenant(trusted=settings.trust_tenant_header)
    if settings.trust_tenant_header:
        keys = {"cache_salt": caller.tenant, "extra_key": None}
    unlearned = settings.samples.directory is not None and (is_warm_up or _is_named_as_check(obj))
    entries, asked = parameters_of(obj), []
    for entry in entries:
        if call is not None and call.asked is not None:
            one = replace(call.asked, params=implied(manager, as_chat(call), call.asked))
        else:
            one = await asked_by(manager, entry.get("custom_params") if isinstance(entry, dict) else None)
        asked.append(_unlearned(one) if unlearned else one)
    for name, value in keys.items():
        setattr(obj, name, value)
    if any(one.params is not None for one in asked):
        filled = [_filled(entry, one.params) for entry, one in zip(entries, asked, strict=True)]
        obj.sampling_params = filled if isinstance(obj.sampling_params, list) else filled[0]
    return asked


def _filled(entry: Any, params: dict[str, Any] | None) -> Any:
    """Return sampling parameters whose `custom_params` have `params` and the keys that SGLang put there by itself."""
    if params is None:
        return entry
    known = entry or {}
    return {**known, "custom_params": {**(known.get("custom_params") or {}), **params}}


async def asked_by(manager: Any, custom_params: Any) -> Asked:
    """Return the record of `custom_params`, with the header's agent if they name none. A thread tokenises a predicted
    text, so that the event loop goes on.

    Raises:
        HintError: naming the field that is wrong.
    """
    hints, agent = validate_custom_params(custom_params), CALLER.get().agent
    if agent is not None and hints.agent is None:
        custom_params = (
            add_hints(custom_params, {"agent": agent}) or custom_params
        )  # unchanged if there is no room for it
        hints = validate_custom_params(custom_params)
    if custom_params is None:
        return Asked(None, hints)
    settings, vocabulary = settings_of(manager.server_args), manager.model_config.vocab_size
    check_forced(custom_params, vocabulary, allowed=settings.force_recorded)
    if custom_params.get(CARRIED_PREDICTION) is None:
        return Asked(custom_params, hints)
    longest = settings.lookup.prediction_tokens
    reader = prediction_reader(manager.tokenizer, longest, vocabulary)
    found = await asyncio.get_running_loop().run_in_executor(None, reader, custom_params)
    assert found is not None
    tokens, is_cut = found
    note = f"the prediction was cut to its first {longest} tokens (lookup.prediction_tokens of the bundle)"
    return Asked({**custom_params, CARRIED_PREDICTION: tokens}, hints, (note,) if is_cut else ())


def _is_named_as_check(obj: Any) -> bool:
    """Whether a request has the name of a health check. A client may choose such a name, so it opens nothing."""
    rid = getattr(obj, "rid", None)
    return isinstance(rid, str) and rid.startswith(HEALTH_CHECK_RID_PREFIX)


def _unlearned(asked: Asked) -> Asked:
    """Return `asked` with learning switched off, so that the request's text becomes no sample."""
    params = add_hints(asked.params, {"learn": False})
    kept = {"learn": False, "lookup": asked.hints.lookup, "off": asked.hints.off}  # if not all hints fit
    return replace(asked, params=params or {**(asked.params or {}), WIRE_KEY: json.dumps(kept)})


def _without_texts(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are read later, without prompts, which may be long: SGLang has its own copies of them."""
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


def as_chat(call: Call) -> SimpleNamespace:
    """Return the parts of an accepted request that imply spans and tool calls, shaped as SGLang's chat requests."""
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
    """Return the body's tools that have the field `part`."""
    return [tool for tool in body.get("tools") or () if isinstance(tool, dict) and tool.get(part) is not None]


def _named(choice: Mapping[str, Any]) -> Any:
    """Return a chat request's choice of the one tool that is named; `auto` without a name."""
    name = choice.get("name") or (choice.get("function") or {}).get("name")
    return SimpleNamespace(function=SimpleNamespace(name=name)) if name else "auto"


def implied(manager: Any, request: Any, asked: Asked) -> dict[str, Any] | None:
    """Return `custom_params` with the spans and the tools that the request implies. request: a result of `as_chat`."""
    params = asked.params
    if not asked.hints.infer:
        return params
    if not asked.hints.spans and (spans := _inferred(manager, request)):
        told = add_hints(params, {"spans": [span.model_dump(exclude_defaults=True) for span in spans]})
        params = params if told is None else {**told, INFERRED_KEY: True}
    tools = _tools(manager, request)
    return params if tools is None else {**(params or {}), TOOLS_KEY: tools}


def _tools(manager: Any, request: Any) -> str | None:
    """Return the tools that may be called, encoded for the scheduler; None if it drafts no calls of them."""
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
    """Return the beginning of the answer if a chat continues its last message, else empty text."""
    last = request.messages[-1] if getattr(request, "continue_final_message", False) else None
    content = getattr(last, "content", None)
    return content if isinstance(content, str) and getattr(last, "role", None) == "assistant" else ""

"""Read and check WHIFLASH's fields of a request once, before it is scheduled: hints, a prediction, a forced answer, the
keys of its tenant. Runs in the process that serves HTTP.

Requests of routes that SGLang converts are read from their bodies (`read`), before SGLang drops fields that it does not
know, and get the spans and tools that they imply. Others are read from their sampling parameters (`take_up`).
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal, TypeVar
from uuid import uuid4

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.entrypoints.openai.responses_adapters import custom_tool_parameters
from sglang.srt.managers.tokenizer_manager import ServerStatus
from whiflash_sdk.hints import INFERRED_KEY, WIRE_KEY
from whiflash_sdk.presets import likely_spans

from whiflash_sglang.copying.groups import SIBLINGS
from whiflash_sglang.engine.carried import settings_of
from whiflash_sglang.http.callers import CALLER
from whiflash_sglang.http.previews import prepare
from whiflash_sglang.http.sessions import scope
from whiflash_sglang.spans.carrier import add_hints, validate_custom_params
from whiflash_sglang.spans.forced import check_forced
from whiflash_sglang.spans.hints import CARRIED_PREDICTION, TOOLS_KEY, HintError, RequestHints
from whiflash_sglang.spans.prediction import body_prediction, prediction_reader
from whiflash_sglang.structure.tools import carried_tools

T = TypeVar("T")
Form = Literal["chat", "completion", "responses", "messages", "native"]
"""The API by whose schema a request is written. A native request has `sampling_params`, which carry its hints."""
_TEXTS = ("prompt", "input", "instructions", "system", "prediction")
"""Fields of a body that are not needed after it was read, and may be long. SGLang has its own copies of them."""
KEYS = ("cache_salt", "extra_key", "session_id")
"""Fields of a body by which SGLang keeps KV."""
_FUNCTIONS = ("function", "custom")
"""Types of Responses' tools that a model calls; SGLang has others."""


@dataclass(frozen=True, slots=True)
class Fields:
    """WHIFLASH's fields in one set of sampling parameters.

    params: its `custom_params`, with additions from other fields and a prediction as token ids; None without any.
    hints: the hints in them. notes: remarks on the prediction, for the traces of its choices.
    """

    params: dict[str, Any] | None = None
    hints: RequestHints = field(default_factory=RequestHints)
    notes: tuple[str, ...] = ()

    @property
    def prediction(self) -> Sequence[int] | None:
        """Return the token ids that the client predicts as the answer; None without a prediction."""
        return (self.params or {}).get(CARRIED_PREDICTION)

    def unlearned(self) -> "Fields":
        """Return these fields with learning switched off, so that the request's text becomes no sample."""
        params = add_hints(self.params, {"learn": False})
        if params is None:  # no room for another hint: keep those that change more than a guess
            hints = {"learn": False, "lookup": self.hints.lookup, "off": self.hints.off}
            params = {**(self.params or {}), WIRE_KEY: json.dumps(hints)}
        return replace(self, params=params)

    def grouped(self) -> "Fields":
        """Return the request's fields with a new task name, unless they name a task, so that the `n` answers to its
        prompt may copy from each other.
        """
        named = self.hints.task is None and add_hints(self.params, {"task": f"{SIBLINGS}{uuid4().hex}"})
        return replace(self, params=named) if named else self


@dataclass(slots=True)
class Call:
    """One request of a route in `middleware.FORMS`, until its answer is sent.

    body: as SGLang parses it, without its texts. It is empty, and `fields` is None, if the request is native or SGLang
    will refuse it. keys: `cache_salt`, `extra_key` and `session_id` of Messages, since SGLang's model has no field for
    them.
    """

    form: Form
    body: Mapping[str, Any] = field(default_factory=dict)
    fields: Fields | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    # Filled by `generate_request` while outputs pass:
    traces: list[tuple[dict[str, Any], str | None]] = field(default_factory=list)
    """Traces of choices that have ended, each with the text that its offsets refer to."""
    counts: dict[int, dict[str, int]] = field(default_factory=dict)
    """Numbers of accepted and rejected tokens of its prediction, by choice."""
    holds: bool = False
    """Whether `writer.joining` holds the events that the route sends, since more of the same output follow."""
    flush: Callable[[], Awaitable[None]] | None = None
    """Sends the events that are held, and ends holding."""


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
    """Read and check the body of a request of a route that SGLang converts. Raises HintError naming the wrong field."""
    if not isinstance(body, dict):  # SGLang refuses it
        return Call(form)
    params = body.get("custom_params")
    for name, value in _objects(form, body):
        if not isinstance(value, dict):
            raise HintError(name, "must be an object")
    if (text := body_prediction(body)) is not None:
        if CARRIED_PREDICTION in (params or {}):
            raise HintError("prediction", f"given twice, also as custom_params.{CARRIED_PREDICTION}; give one of them")
        params = {**(params or {}), CARRIED_PREDICTION: text}
    fields = await fields_of(manager, params)
    if body.get("previous_response_id") is not None:  # an earlier turn may have opted out of learning
        fields = fields.unlearned()
    keys = {name: body[name] for name in KEYS if form == "messages" and body.get(name) is not None}
    if wrong := [name for name, value in keys.items() if not isinstance(value, str)]:
        raise HintError(wrong[0], "must be text")
    short = {name: value for name, value in body.items() if name not in _TEXTS}
    if isinstance(messages := body.get("messages"), list):  # the last may begin the answer, others may bring tools
        tools = [one for one in messages[:-1] if isinstance(one, dict) and one.get("tools")]
        short["messages"] = [*tools, *messages[-1:]]
    return Call(form, short, fields, keys)


def _objects(form: Form, body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each field that must be an object: a wrong `response_format` is a 500 in SGLang."""
    yield "custom_params", body.get("custom_params") or {}
    yield "response_format", (output := body.get("response_format") or {})
    if form == "chat" and output.get("type") == "json_schema" and not output.get("json_schema"):
        yield "response_format.schema", (schema := output.get("schema") or {})
        yield "response_format.schema.properties", (properties := schema.get("properties", {}))
        yield "response_format.schema.properties.strict", properties.get("strict") or {}


async def take_up(manager: Any, obj: Any, call: Call | None) -> list[Fields]:
    """Return the fields of SGLang's internal request `obj`: one record for all prompts, or one for each. Its sampling
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
        keys = {**keys, "cache_salt": caller.tenant, "extra_key": None}
    # A client may choose the name of a health check, so that name opens nothing.
    is_check = str(getattr(obj, "rid", None)).startswith(HEALTH_CHECK_RID_PREFIX)
    is_unlearned = settings.samples.directory is not None and (is_warm_up or is_check)
    entries, fields = parameters_of(obj), list[Fields]()
    for entry in entries:
        if call is not None and call.fields is not None:
            one = replace(call.fields, params=implied(manager, as_chat(call), call.fields))
        else:
            one = await fields_of(manager, entry.get("custom_params") if isinstance(entry, dict) else None)
        one = one.unlearned() if is_unlearned else one
        fields.append(one.grouped() if isinstance(entry, dict) and entry.get("n", 1) not in (1, None) else one)
    for name, value in keys.items():
        setattr(obj, name, value)
    if manager.server_args.enable_session_radix_cache:
        scope(obj, caller.session, manager.server_args)
    if any(one.params is not None for one in fields):
        filled = [_filled(entry, one.params) for entry, one in zip(entries, fields, strict=True)]
        obj.sampling_params = filled if isinstance(obj.sampling_params, list) else filled[0]
    if markers := [one.hints.preview for one in fields if one.hints.preview is not None]:
        await prepare(manager, obj, markers[0])
    return fields


def _filled(entry: Any, params: dict[str, Any] | None) -> Any:
    """Return sampling parameters whose `custom_params` have `params` and the keys that SGLang put there by itself."""
    if params is None:
        return entry
    given = entry or {}
    return {**given, "custom_params": {**(given.get("custom_params") or {}), **params}}


async def fields_of(manager: Any, custom_params: Any) -> Fields:
    """Read `custom_params`, with the header's agent if they name none. A thread tokenises a predicted text, so that the
    event loop goes on. Raises HintError naming the wrong field."""
    hints, agent = validate_custom_params(custom_params), CALLER.get().agent
    if agent is not None and hints.agent is None:
        # They stay as they are if they have no room for it.
        custom_params = add_hints(custom_params, {"agent": agent}) or custom_params
        hints = validate_custom_params(custom_params)
    if custom_params is None:
        return Fields(None, hints)
    settings, vocabulary = settings_of(manager.server_args), manager.model_config.vocab_size
    check_forced(custom_params, vocabulary, allowed=settings.force_recorded)
    longest = settings.lookup.prediction_tokens
    reader = prediction_reader(manager.tokenizer, longest, vocabulary)
    prediction = None
    if custom_params.get(CARRIED_PREDICTION) is not None:
        prediction = await asyncio.get_running_loop().run_in_executor(None, reader, custom_params)
    if prediction is None:
        return Fields(custom_params, hints)
    tokens, is_cut = prediction
    note = f"the prediction was cut to its first {longest} tokens (lookup.prediction_tokens of the bundle)"
    return Fields({**custom_params, CARRIED_PREDICTION: tokens}, hints, (note,) if is_cut else ())


def as_chat(call: Call) -> SimpleNamespace:
    """Return the parts of an accepted request that imply spans and tool calls, shaped as SGLang's chat requests."""
    body, choice, tools = call.body, call.body.get("tool_choice"), list[tuple[str, Any]]()
    output, last = body.get("response_format"), list[Any]()
    if call.form == "responses":
        tools = [
            (tool["name"], custom_tool_parameters() if tool["type"] == "custom" else tool.get("parameters"))
            for tool in _tools_of(body, "name")
            if tool.get("type") in _FUNCTIONS
        ]
        choice = _choice(choice, choice.get("type") in _FUNCTIONS) if isinstance(choice, dict) else choice
        choice = choice if tools else "none"
        output = (body.get("text") or {}).get("format")
    elif call.form == "messages":
        tools = [
            (tool["name"], tool["input_schema"])
            for tool in _tools_of(body, "input_schema")
            if tool.get("type") in (None, "custom") and tool.get("name")
        ]
        if isinstance(choice, dict):
            word = str(choice.get("type"))
            choice = _choice(choice, True) if word == "tool" else {"any": "required"}.get(word, word)
        output = (body.get("output_config") or {}).get("format") and {"type": "json_schema"}
    elif call.form == "chat":
        functions = [tool["function"] for tool in _tools_of(body, "function")]
        tools = [(function["name"], function.get("parameters")) for function in functions]
        choice = _choice(choice, True) if isinstance(choice, dict) else choice
        last = body["messages"][-1:] if body.get("continue_final_message") else []
    return SimpleNamespace(
        tools=[SimpleNamespace(function=SimpleNamespace(name=name, parameters=p)) for name, p in tools],
        tool_choice=choice,
        response_format=SimpleNamespace(type=output.get("type")) if isinstance(output, dict) else None,
        continue_final_message=bool(last),
        messages=[SimpleNamespace(role=one.get("role"), content=one.get("content")) for one in last],
        _response_parser_json_response_format=False,
    )


def _tools_of(body: Mapping[str, Any], part: str) -> list[Any]:
    """Return the body's tools that have the field `part`."""
    return [tool for tool in body.get("tools") or () if isinstance(tool, dict) and tool.get(part) is not None]


def _choice(choice: Mapping[str, Any], is_named: bool) -> Any:
    """Return a chat request's choice of the one tool that `choice` names; `auto` if it names none."""
    name = choice.get("name") or (choice.get("function") or {}).get("name")
    return SimpleNamespace(function=SimpleNamespace(name=name)) if is_named and name else "auto"


def implied(manager: Any, request: Any, fields: Fields) -> dict[str, Any] | None:
    """Return `custom_params` with the spans and the tools that the request implies. request: a result of `as_chat`."""
    params, choice = fields.params, request.tool_choice
    if not fields.hints.infer:
        return params
    parser = manager.config_value("tool_call_parser")  # `auto` has become a name here, or None
    tools = [] if choice == "none" else [tool.function for tool in request.tools]
    if not fields.hints.spans:
        spans = likely_spans(
            tool_parser=parser,
            reasoning_parser=manager.config_value("reasoning_parser"),
            has_tools=bool(tools),
            response_format=getattr(request.response_format, "type", None),
            forced=choice == "required" or not isinstance(choice, (str, type(None))),
            # The answer of a chat that continues its last message begins with that message.
            prefill="".join(m.content for m in request.messages if (m.role, type(m.content)) == ("assistant", str)),
        )
        added = {"spans": [span.model_dump(exclude_defaults=True) for span in spans]}
        if spans and (longer := add_hints(params, added)) is not None:
            params = {**longer, INFERRED_KEY: True}
    if tools and settings_of(manager.server_args).structure.enabled:
        name = getattr(getattr(choice, "function", None), "name", None)
        carried = carried_tools([(tool.name, tool.parameters) for tool in tools if name in (None, tool.name)], parser)
        params = params if carried is None else {**(params or {}), TOOLS_KEY: carried}
    return params

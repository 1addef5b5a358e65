"""`wrap`: the OpenAI client the user already has, sending hints with what it sends anyway."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypedDict, TypeVar, get_args

import openai
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk.agents import Agent, name_of
from whiflash_sdk.capabilities import Capabilities, Server, ask, async_ask
from whiflash_sdk.collecting import note, open_scope, start
from whiflash_sdk.derive import complete, derive_spans
from whiflash_sdk.errors import warn_unsupported
from whiflash_sdk.hints import AGENT_FIELD, INFERRED_KEY, SCOPES, WIRE_KEY, Hints, Span, TraceLevel, decode
from whiflash_sdk.prediction import predicted_text
from whiflash_sdk.spans import block_hints, opened_span
from whiflash_sdk.streaming import traced_class

ClientT = TypeVar("ClientT", bound="OpenAI | AsyncOpenAI")

_ROUTED_PATHS: Final = ("/chat/completions", "/completions")
_CONVERTED_PATHS: Final = ("/responses",)
"""Requests that a server converts: it derives their spans itself."""
_ADDED: Final = ("custom_params", "prediction", "cache_salt")
"""Fields of a request that the SDK may add or extend."""
_REFUSALS: Final = (openai.BadRequestError, openai.UnprocessableEntityError)
_WRAPPED: Final = "_whiflash_settings"
_FLAGS: Final = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(
    ("", "0", "false", "no", "off"), False
)
_LEVELS: Final[dict[str, TraceLevel]] = {level: level for level in get_args(TraceLevel)}


@dataclass(frozen=True)
class _Settings:
    """What one wrapped client was told."""

    hints: Hints
    strict: bool
    capabilities: Capabilities | bool | None
    agent: Agent | None
    tenant: str | None


class Settings(TypedDict, total=False):
    """The arguments of `wrap`, as the adapters pass them on."""

    hints: Hints | None
    strict: bool
    trace: bool | TraceLevel | None
    capabilities: Capabilities | bool | None
    agent: Agent | None
    tenant: str | None


def wrap(
    client: ClientT,
    *,
    hints: Hints | None = None,
    strict: bool = False,
    trace: bool | TraceLevel | None = None,
    capabilities: Capabilities | bool | None = None,
    agent: Agent | None = None,
    tenant: str | None = None,
) -> ClientT:
    """Make `client` send routing hints, and return it: the same object, of the same type.

    Hints come from the request itself (tools, tool choice, response format, a prefilled answer), then
    from `hints` here, from enclosing blocks (`whiflash_sdk.hinted`, `whiflash_sdk.spans`) and from
    `extra_body=Hints(...).extra_body()` on a call; what is set later wins. Clients made from this one
    (`with_options`, `copy`) are wrapped too; to keep an unwrapped one, wrap `client.with_options()`.
    Other routes, and every request to a server that does not route, go out untouched. (`copy.copy` makes no client of
    its own: what it returns asks through this one.)

    client: an `OpenAI` or `AsyncOpenAI`, or a subclass.
    hints: hints for every call.
    strict: raise UnsupportedServerError where the server does not route, instead of warning once.
    trace: ask for the routing trace with every response; read it with `routing`. True, the default, is "summary":
        sums by drafter. "full" has the stretches too, for `whiflash_sdk.render`.
    capabilities: None asks the server. Where something in front of it hides the answer, the `Capabilities`
        that it has, which hold for requests for their `model` if they name one; or True: it routes, and derives spans
        itself. False: it does not route; no hints go out, nobody is asked or told.
    agent: who asks with this client, a name or a function that tells it at every call; `hints` here, blocks and calls
        that name one win. The adapters' models ask their framework.
    tenant: whose text the answers are: sent as SGLang's `cache_salt` with chat and text completions that have none, to
        a server that routes. Cached prompts and, where the server keeps outputs to copy from, these are shared under
        one salt alone; without one no output is kept.

    Environment, read here: `WHIFLASH_SDK_TRACE` (0, 1 or a level) and `WHIFLASH_SDK_ASSUME` (1: `capabilities=True`)
    where the argument is not given; `WHIFLASH_SDK_DISABLE` (1: `capabilities=False`) in any case.

    Raises: TypeError if `client` is something else; ValueError for an empty tenant, which would be no salt, and for a
    variable that says neither yes nor no.
    """
    if not isinstance(client, OpenAI | AsyncOpenAI):
        raise TypeError(f"wrap takes an OpenAI or AsyncOpenAI client, not {type(client).__name__}")
    if tenant == "":
        raise ValueError("tenant: give a name, or None where no text is to be shared")
    if trace is None:
        level = os.environ.get("WHIFLASH_SDK_TRACE", "").lower()
        trace = _LEVELS[level] if level in _LEVELS else _environment("TRACE", default=True)
    if _environment("DISABLE", default=False):
        capabilities = False
    elif capabilities is None and _environment("ASSUME", default=False):
        capabilities = True
    elif isinstance(capabilities, Capabilities):
        capabilities = capabilities.assumed()
    asked = (hints or Hints()).over(Hints(trace=trace))
    _install(client, _Settings(asked, strict, capabilities, agent, tenant))
    return client


def settings_of(client: Any) -> _Settings | None:
    """What a wrapped client was told; None of one that is not wrapped."""
    settings: _Settings | None = vars(client).get(_WRAPPED)
    return settings


def _environment(name: str, *, default: bool) -> bool:
    variable = f"WHIFLASH_SDK_{name}"
    text = os.environ.get(variable)
    if text is None:
        return default
    if text.lower() not in _FLAGS:
        raise ValueError(f"{variable}: give 1 or 0, not {text!r}")
    return _FLAGS[text.lower()]


def _install(
    client: OpenAI | AsyncOpenAI, settings: _Settings, origin: OpenAI | AsyncOpenAI | None = None
) -> None:
    already = _WRAPPED in vars(client)
    vars(client)[_WRAPPED] = settings
    if already:
        return
    open_scope(client, origin)
    vars(client)["request"] = _sync_request(client) if isinstance(client, OpenAI) else _async_request(client)
    for name in ("copy", "with_options"):
        vars(client)[name] = _wrapping_copy(client, name)


def _inherited(client: OpenAI | AsyncOpenAI, name: str) -> Callable[[], Callable[..., Any]]:
    """Finds the method that a wrapped one goes on to, at every call: tracers replace it on the class at any time."""
    own = vars(client).get(name)
    return lambda: own or functools.partial(getattr(type(client), name), client)


def _wrapping_copy(client: OpenAI | AsyncOpenAI, name: str) -> Callable[..., Any]:
    inherited = _inherited(client, name)

    @functools.wraps(getattr(client, name))
    def copied(*args: Any, **kwargs: Any) -> Any:
        made = inherited()(*args, **kwargs)
        _install(made, vars(client)[_WRAPPED], client)
        return made

    return copied


def _sync_request(client: Any) -> Callable[..., Any]:
    """The client's one door to the network, with hints put in and traces taken out."""
    inherited = _inherited(client, "request")

    @functools.wraps(client.request)
    def request(cast_to: Any, options: Any, **kwargs: Any) -> Any:
        send = functools.partial(inherited(), cast_to)
        if not _is_routed(options):
            return send(options, **kwargs)
        settings: _Settings = vars(client)[_WRAPPED]
        server = ask(client, options.timeout, _model(options)) if settings.capabilities is None else None
        call = _Call(client, options, kwargs, settings, server)
        try:
            result = send(call.options, **call.kwargs)
        except _REFUSALS as error:
            refused = call.refused(error)
            if refused is None:
                raise
            result = send(call.plain, **kwargs)
            call.served_without(refused)
        note(result, call.collected)
        return result

    return request


def _async_request(client: Any) -> Callable[..., Any]:
    inherited = _inherited(client, "request")

    @functools.wraps(client.request)
    async def request(cast_to: Any, options: Any, **kwargs: Any) -> Any:
        send = functools.partial(inherited(), cast_to)
        if not _is_routed(options):
            return await send(options, **kwargs)
        settings: _Settings = vars(client)[_WRAPPED]
        server = (
            await async_ask(client, options.timeout, _model(options))
            if settings.capabilities is None
            else None
        )
        call = _Call(client, options, kwargs, settings, server)
        try:
            result = await send(call.options, **call.kwargs)
        except _REFUSALS as error:
            refused = call.refused(error)
            if refused is None:
                raise
            result = await send(call.plain, **kwargs)
            call.served_without(refused)
        note(result, call.collected)
        return result

    return request


class _Call:
    """One request: as it goes out, and as it would without `wrap`, in case the server refuses what was added.

    server: what is known of it; None if the settings say what it can do.
    """

    def __init__(
        self,
        client: Any,
        options: Any,
        kwargs: dict[str, Any],
        settings: _Settings,
        server: Server | None,
    ) -> None:
        found = _found(settings, server, _model(options))
        self.options = self.plain = options
        self.kwargs = kwargs
        self._strict, self._server = settings.strict, server
        if _takes_hints(found, options.url):
            self.options = _with_hints(options, settings, found)
            self.plain = _with_hints(options, settings, None)
            if found:
                self.kwargs = {**kwargs, "stream_cls": traced_class(kwargs.get("stream_cls"))}
        self.collected = start(client, _agent_sent(self.options))

    def refused(self, error: openai.APIStatusError) -> str | None:
        """Which field of ours the server names as it refuses the request; None: it names none, or `strict` is set."""
        ours, plain = self.options.extra_json or {}, self.plain.extra_json or {}
        added = (name for name in _ADDED if ours.get(name) != plain.get(name))
        return None if self._strict else next((name for name in added if name in error.response.text), None)

    def served_without(self, name: str) -> None:
        """The same request was served without our fields: hints rest, with a warning."""
        self.collected.agent = None
        if self._server is not None:
            self._server.refused(name)
            self._server.require(None, strict=False)
        else:
            warn_unsupported(
                f"the server refuses {name}, though the capabilities given to `wrap` allow it. The request was "
                "repeated without hints"
            )


def _found(settings: _Settings, server: Server | None, model: str | None) -> Capabilities | bool | None:
    """What may go out with a request for this model."""
    given = settings.capabilities
    if server is not None:
        return server.require(model, strict=settings.strict)
    if isinstance(given, Capabilities) and given.model not in ("", model):
        return None
    return given


def _model(options: Any) -> str | None:
    body = options.json_data if isinstance(options.json_data, Mapping) else {}
    model = {**body, **(options.extra_json or {})}.get("model")
    return model if isinstance(model, str) else None


def _agent_sent(options: Any) -> str | None:
    """The name that goes out with the request."""
    params = (options.extra_json or {}).get("custom_params")
    sent = params.get(WIRE_KEY) if isinstance(params, Mapping) else None
    return json.loads(sent).get("agent") if sent else None


def _is_routed(options: Any) -> bool:
    return options.method.lower() == "post" and options.url in (*_ROUTED_PATHS, *_CONVERTED_PATHS)


def _takes_hints(found: Capabilities | bool | None, url: str) -> bool:
    """Whether the request is to be looked at: of a converted route a server has to say that it reads it."""
    return url in _ROUTED_PATHS or (isinstance(found, Capabilities) and url.removeprefix("/") in found.routes)


def _with_hints(options: Any, settings: _Settings, found: Capabilities | bool | None) -> Any:
    """The request with its final hints; without any where the server has no use for them.

    found: True where the server's parsers are not known: it derives what it can, which no span may preclude.
    """
    extra = dict(options.extra_json or {})
    params = extra.pop("custom_params", None)
    if params is not None and not isinstance(params, Mapping):
        return options  # not ours to judge: the server will
    params = dict(params or {})
    carried = params.pop(WIRE_KEY, None)
    if found:
        hints = block_hints().over(settings.hints)
        names_agent = AGENT_FIELD in extra  # a server takes the name once: in the body or in the hints
        if names_agent:
            hints = hints.without(SCOPES)
        if carried is not None:
            hints = decode(carried).over(hints)
        if not names_agent:
            hints = _named(hints, settings.agent)
        derived: tuple[Span, ...] = ()
        if isinstance(found, Capabilities):
            hints = _understood(hints, found)
            if options.url in _ROUTED_PATHS:
                body = options.json_data if isinstance(options.json_data, Mapping) else {}
                derived = derive_spans({**body, **extra}, found.tool_call_parser, found.reasoning_parser)
        opened = opened_span()
        whole = complete(hints, derived, opened)
        params[WIRE_KEY] = whole.encode()
        if whole.spans and not hints.spans and opened is None:
            params[INFERRED_KEY] = True
        extra = {**_predicted(options, found), **_salted(options, settings.tenant), **extra}
    if params:
        extra["custom_params"] = params
    return options.model_copy(update={"extra_json": extra or None})


def _named(hints: Hints, agent: Agent | None) -> Hints:
    """The hints, with the name of who asks where they say nothing of it."""
    name = None if "agent" in hints.model_fields_set else name_of(agent)
    return hints if name is None else Hints(agent=name).over(hints)


def _understood(hints: Hints, found: Capabilities) -> Hints:
    """The hints, without what a server of before would refuse."""
    if hints.trace not in (False, *found.traces):  # those have one level, the full one
        hints = hints.model_copy(update={"trace": True})
    return hints.without(name for name in SCOPES if name not in found.scopes)


def _salted(options: Any, tenant: str | None) -> dict[str, Any]:
    """The tenant as a salt, where the call has none of its own and its route reads one."""
    body = options.json_data if isinstance(options.json_data, Mapping) else {}
    takes = tenant is not None and options.url in _ROUTED_PATHS and "cache_salt" not in body
    return {"cache_salt": tenant} if takes else {}


def _predicted(options: Any, found: Capabilities | bool) -> dict[str, Any]:
    """The enclosing block's prediction, where the call has none of its own and the server understands it."""
    text = predicted_text()
    body = options.json_data if isinstance(options.json_data, Mapping) else {}
    understood = found is True or (isinstance(found, Capabilities) and found.prediction_tokens > 0)
    if text is None or "prediction" in body or not understood:
        return {}
    # A file may have been read with surrogates for bytes that are no text: no request can carry these.
    return {"prediction": {"type": "content", "content": text.encode(errors="replace").decode()}}

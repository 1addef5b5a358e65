"""`wrap`: the OpenAI client the user already has, sending hints with what it sends anyway."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from openai import AsyncOpenAI, OpenAI

from whiflash_sdk.capabilities import Capabilities, async_capabilities, capabilities, require
from whiflash_sdk.collecting import note
from whiflash_sdk.derive import complete, derive_spans
from whiflash_sdk.errors import HintError
from whiflash_sdk.hints import WIRE_KEY, Hints, decode
from whiflash_sdk.spans import block_hints, opened_span

ClientT = TypeVar("ClientT", bound="OpenAI | AsyncOpenAI")

_ROUTED_PATHS: Final = ("/chat/completions", "/completions")
_WRAPPED: Final = "_whiflash_settings"


@dataclass(frozen=True)
class _Settings:
    """What one wrapped client was told."""

    hints: Hints
    strict: bool


def wrap(client: ClientT, *, hints: Hints | None = None, strict: bool = False, trace: bool = True) -> ClientT:
    """Make `client` send routing hints, and return it: the same object, of the same type.

    Hints come from the request itself (tools, tool choice, response format, a prefilled answer), then
    from `hints` here, from enclosing blocks (`whiflash_sdk.spans`) and from `hints=` or
    `extra_body=Hints(...).extra_body()` on a call; what is set later wins. Clients made from this one
    (`with_options`, `copy`) are wrapped too; to keep an unwrapped one, wrap `client.with_options()`.
    Other routes, and every request to a server that does not route, go out untouched.

    client: an `OpenAI` or `AsyncOpenAI`, or a subclass.
    hints: hints for every call.
    strict: raise UnsupportedServerError where the server does not route, instead of warning once.
    trace: ask for the routing trace with every response; read it with `routing`.

    Raises: TypeError if `client` is something else.
    """
    if not isinstance(client, OpenAI | AsyncOpenAI):
        raise TypeError(f"wrap takes an OpenAI or AsyncOpenAI client, not {type(client).__name__}")
    asked = (hints or Hints()).over(Hints(trace=trace))
    already = _WRAPPED in vars(client)
    vars(client)[_WRAPPED] = _Settings(asked, strict)
    if already:
        return client
    vars(client)["request"] = _sync_request(client) if isinstance(client, OpenAI) else _async_request(client)
    for name in ("copy", "with_options"):
        vars(client)[name] = _wrapping_copy(client, getattr(client, name))
    for resource in (client.chat.completions, client.completions):
        _accept_hints(resource)
    return client


def _wrapping_copy(client: OpenAI | AsyncOpenAI, copy: Callable[..., ClientT]) -> Callable[..., ClientT]:
    @functools.wraps(copy)
    def copied(*args: Any, **kwargs: Any) -> ClientT:
        settings: _Settings = vars(client)[_WRAPPED]
        return wrap(copy(*args, **kwargs), hints=settings.hints, strict=settings.strict)

    return copied


def _accept_hints(resource: object) -> None:
    """`hints=` on the methods that send a completion, as a shorthand for `extra_body`."""
    for view in ("with_raw_response", "with_streaming_response"):
        vars(resource).pop(view, None)  # cached views hold the methods as they were
    for name in ("create", "parse", "stream"):
        method = getattr(resource, name, None)
        if method is not None:
            setattr(resource, name, _with_hints_argument(method))


def _with_hints_argument(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, hints: Hints | None = None, **kwargs: Any) -> Any:
        if hints is not None:
            if not isinstance(hints, Hints):
                raise HintError(f"hints: give a whiflash_sdk.Hints, not {type(hints).__name__}")
            body = dict(kwargs.get("extra_body") or {})
            params = {**(body.get("custom_params") or {}), **hints.custom_params()}
            kwargs["extra_body"] = {**body, "custom_params": params}
        return method(*args, **kwargs)

    return call


def _sync_request(client: Any) -> Callable[..., Any]:
    """The client's one door to the network, with hints put in and traces taken out."""
    inherited = client.request

    @functools.wraps(inherited)
    def request(cast_to: Any, options: Any, **kwargs: Any) -> Any:
        if not _is_routed(options):
            return inherited(cast_to, options, **kwargs)
        settings: _Settings = vars(client)[_WRAPPED]
        found = capabilities(client)
        require(found, client, strict=settings.strict)
        result = inherited(cast_to, _with_hints(options, settings.hints, found), **kwargs)
        note(result)
        return result

    return request


def _async_request(client: Any) -> Callable[..., Any]:
    inherited = client.request

    @functools.wraps(inherited)
    async def request(cast_to: Any, options: Any, **kwargs: Any) -> Any:
        if not _is_routed(options):
            return await inherited(cast_to, options, **kwargs)
        settings: _Settings = vars(client)[_WRAPPED]
        found = await async_capabilities(client)
        require(found, client, strict=settings.strict)
        result = await inherited(cast_to, _with_hints(options, settings.hints, found), **kwargs)
        note(result)
        return result

    return request


def _is_routed(options: Any) -> bool:
    return options.method.lower() == "post" and options.url in _ROUTED_PATHS


def _with_hints(options: Any, outer: Hints, found: Capabilities | None) -> Any:
    """The request with its final hints; without any where the server has no use for them."""
    extra = dict(options.extra_json or {})
    params = extra.pop("custom_params", None)
    if params is not None and not isinstance(params, Mapping):
        return options  # not ours to judge: the server will
    params = dict(params or {})
    carried = params.pop(WIRE_KEY, None)
    if found is not None:
        hints = block_hints().over(outer)
        if carried is not None:
            hints = decode(carried).over(hints)
        body = options.json_data if isinstance(options.json_data, Mapping) else {}
        derived = derive_spans({**body, **extra}, found.tool_call_parser, found.reasoning_parser)
        params[WIRE_KEY] = complete(hints, derived, opened_span()).encode()
    if params:
        extra["custom_params"] = params
    return options.model_copy(update={"extra_json": extra or None})

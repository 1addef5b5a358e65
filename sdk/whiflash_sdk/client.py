"""`wrap`: makes an existing OpenAI or Anthropic client send hints with its requests."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final, Protocol, TypeVar

from typing_extensions import Unpack

from whiflash_sdk.collecting import open_scope
from whiflash_sdk.flow import Flow, run, run_async
from whiflash_sdk.identity import OfClient, api_clients
from whiflash_sdk.outgoing import ClientSettings, Told, exchange, route_of
from whiflash_sdk.streaming import note


class ApiClient(Protocol):
    """Members that OpenAI's and Anthropic's clients share, for type checkers."""

    max_retries: int

    @property
    def default_headers(self) -> Any:
        """Return the headers that are sent with every request."""


ClientT = TypeVar("ClientT", bound=ApiClient)

_WRAPPED: Final = "_whiflash_settings"
_ITSELF: Final = "_whiflash_itself"
"""Whether `wrap` was called on this client; else its settings are inherited from the client that it was made from."""
_OWNER: Final = "_whiflash_owner"
_DOORS: Final = ("copy", "with_options", "request")


def wrap(client: ClientT, **settings: Unpack[ClientSettings]) -> ClientT:
    """Make `client` send routing hints, and return it: the same object, of the same type.

    Hints come from the request itself (tools, tool choice, response format, a prefilled answer), then
    from `hints` here, from enclosing blocks (`whiflash_sdk.hinted`, `whiflash_sdk.spans`) and from
    `extra_body=Hints(...).extra_body()` on a call; what is set later wins. Clients made from this one
    (`with_options`, `copy`) are wrapped too, and `wrap` may give them other settings; to keep an unwrapped one, wrap
    `client.with_options()`.
    Other routes, and every request to a server that does not route, go out untouched. (`copy.copy` makes no client of
    its own: what it returns asks through this one.)

    client: an `OpenAI` or `AsyncOpenAI`, an `Anthropic` or `AsyncAnthropic`, or a subclass.
    hints: hints for every call.
    strict: raise UnsupportedServerError if the server does not route, instead of warning once.
    trace: ask for the routing trace with every response; read it with `routing`. True, the default, is "summary":
        sums by drafter. "full" has the stretches too, for `whiflash_sdk.render`.
    capabilities: None asks the server. If something in front of it hides the answer, give its `Capabilities`, which
        hold for requests for their `model` if they name one, or True: it routes, and derives spans itself. False: it
        does not route; no hints go out, and the server is not asked.
    agent: name of the agent that uses this client, or a function that returns it at every call; `hints` here, blocks
        and calls that name one win. The adapters' models ask their framework.
    tenant: owner of the answers' text, sent as SGLang's `cache_salt` with requests that have none, to a server that
        routes. Cached prompts are shared under one salt only.

    `WHIFLASH_SDK_DISABLE=1` in the environment, read here, is `capabilities=False` in any case.

    Raises: TypeError if `client` is something else; ValueError for a client that was wrapped with other settings or has
    an `http_client` of this SDK, for an empty tenant, which would be no salt, and for a variable that says neither yes
    nor no.
    """
    if not isinstance(client, (*api_clients(asynchronous=False), *api_clients(asynchronous=True))):
        raise TypeError(
            "wrap takes an OpenAI or AsyncOpenAI client, or Anthropic's, not "
            f"{type(client).__name__}. For other libraries see whiflash_sdk.http_client"
        )
    if settings_below(client) is not None:
        raise ValueError(
            "wrap: this client's http_client sends hints already: leave wrap out, and give it the settings"
        )
    told = Told.of(**settings)
    before = settings_of(client)
    others = [f.name for f in fields(Told) if getattr(before, f.name, None) != getattr(told, f.name)]
    if before is not None and vars(client)[_ITSELF] and others:
        raise ValueError(
            f"wrap: this client is wrapped already, with other {', '.join(others)}. Its other users would send the new "
            "ones too. Wrap a copy, client.with_options(), or a framework's model of its own"
        )
    _install(client, told)
    return client


def apart(client: Any, owner: object) -> Any:
    """Return a copy of the client that only `owner` uses, to be wrapped; the client itself if it is such a copy.

    A tracer that replaced `request` on this client only also sees the copy's requests.
    """
    held = vars(client).get(_OWNER)
    if held is not None and held() is owner:
        return client
    try:
        made = client.with_options()
    except TypeError:  # a subclass with other arguments
        made = _view(client)
    own = vars(client).get("request")
    if own is not None and _WRAPPED not in vars(client):
        vars(made)["request"] = own
    vars(made)[_OWNER] = weakref.ref(owner)
    return made


def _view(client: Any) -> Any:
    """Return a copy of the client on the same connections; its resources (`chat`, ...) send through the copy."""
    made = copy.copy(client)
    told: Told | None = vars(made).pop(_WRAPPED, None)
    for name in tuple(vars(made)):
        of_class = getattr(type(made), name, None)
        if isinstance(of_class, functools.cached_property) or (told and name in _DOORS):
            del vars(made)[name]
    if told:
        _install(made, told, client)
    return made


def settings_of(client: Any) -> Told | None:
    """Return the settings of a wrapped client; None if it is not wrapped."""
    told: Told | None = vars(client).get(_WRAPPED)
    return told


def settings_below(client: Any) -> Told | None:
    """Return the settings of the SDK's `http_client` that a client sends through; None for another HTTP client."""
    told: Told | None = getattr(getattr(getattr(client, "_client", None), "_transport", None), "told", None)
    return told


def _install(client: Any, told: Told, origin: Any = None) -> None:
    """Wrap a client. origin: the wrapped client that it was made from, if any."""
    already = _WRAPPED in vars(client)
    vars(client)[_WRAPPED], vars(client)[_ITSELF] = told, origin is None
    if already:
        return
    open_scope(client, origin)
    vars(client)["request"] = _hinting_request(client)
    for name in _DOORS[:2]:
        vars(client)[name] = _wrapping_copy(client, name)


def _inherited(client: Any, name: str) -> Callable[[], Callable[..., Any]]:
    """Return a function that finds the client's own method at each call: tracers may replace it on the class later."""
    own = vars(client).get(name)
    return lambda: own or functools.partial(getattr(type(client), name), client)


def _wrapping_copy(client: Any, name: str) -> Callable[..., Any]:
    inherited = _inherited(client, name)

    @functools.wraps(getattr(client, name))
    def copied(*args: Any, **kwargs: Any) -> Any:
        made = inherited()(*args, **kwargs)
        _install(made, vars(client)[_WRAPPED], client)
        return made

    return copied


def _hinting_request(client: Any) -> Callable[..., Any]:
    """Return a `request` method, which all calls of the client use, that adds hints and takes traces out."""
    inherited = _inherited(client, "request")
    is_async = isinstance(client, api_clients(asynchronous=True))
    drive = run_async if is_async else run

    @functools.wraps(client.request)
    def request(cast_to: Any, options: Any, **kwargs: Any) -> Any:
        door = functools.partial(inherited(), cast_to, **kwargs)
        route = _route(options)
        if route is None:
            return door(options)

        def send(body: Mapping[str, Any]) -> Flow[Any]:
            return (yield door(_carrying(options, body)))

        told, body = vars(client)[_WRAPPED], {**(options.json_data or {}), **(options.extra_json or {})}
        asked: Any = {"asker": OfClient(client, options.headers), "timeout": options.timeout, "is_async": is_async}
        return drive(exchange(client, told, route, body, **asked, send=send, take=note))

    @functools.wraps(client.request)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        return await request(*args, **kwargs)

    return awaited if is_async else request


def _route(options: Any) -> str | None:
    """Return the route that a JSON object is posted to; None for other requests, which are sent unchanged."""
    raw = getattr(options, "content", None) is not None or bool(options.files)
    if raw or options.method.lower() != "post" or not isinstance(options.json_data, Mapping | None):
        return None
    return route_of(options.url)


def _carrying(options: Any, body: Mapping[str, Any]) -> Any:
    """Return the request's options with this body; fields that are not in `body` are removed."""
    own = options.json_data or {}
    extra = {name: value for name, value in body.items() if name not in own or own[name] is not value}
    kept = {name: value for name, value in own.items() if name in body}
    return options.model_copy(update={"json_data": kept if own else options.json_data, "extra_json": extra or None})

"""Adds hints, predictions and tenants to the JSON body of an outgoing request, for clients and HTTP transports."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypedDict

from whiflash_sdk.agents import Agent, name_of
from whiflash_sdk.blocks import predicted_text
from whiflash_sdk.capabilities import AskedServer, Capabilities, ask, async_ask
from whiflash_sdk.collecting import start
from whiflash_sdk.derive import derive_spans, open_first
from whiflash_sdk.errors import guessed, warn_unsupported
from whiflash_sdk.flow import Flow, ResultT
from whiflash_sdk.hints import WIRE_KEY, Hints, Span, TraceLevel, decode
from whiflash_sdk.identity import Asker
from whiflash_sdk.reading import json_or_none, text_or_none
from whiflash_sdk.session import Session, conversation, session, turn_of
from whiflash_sdk.spans import block_hints, opened_span

_DERIVED: Final = ("chat/completions", "completions")
_CONVERTED: Final = ("responses", "v1/messages")
"""Routes whose requests a server converts to chat completions: the SDK does not read their tools."""
REFUSALS: Final = (400, 422)
_ADDED: Final = ("custom_params", "prediction", "cache_salt", "session_id")
"""Fields of a request that the SDK may add or extend."""
_INSIDE: Final = (f"custom_params.{WIRE_KEY}", "prediction.content")
"""Names in the refusal of a server that reads these fields, but refuses their value in this request."""
_FLAGS: Final = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("", "0", "false", "no", "off"), False)


class ClientSettings(TypedDict, total=False):
    """Arguments of `wrap`, which the adapters and `http_client` take, too."""

    hints: Hints | None
    strict: bool
    trace: bool | TraceLevel | None
    capabilities: Capabilities | bool | None
    agent: Agent | None
    tenant: str | None


@dataclass(frozen=True)
class Told:
    """Settings of one wrapped client: the arguments of `wrap`, completed by `of`."""

    hints: Hints
    strict: bool
    capabilities: Capabilities | bool | None
    agent: Agent | None
    tenant: str | None

    @classmethod
    def of(
        cls,
        *,
        hints: Hints | None = None,
        strict: bool = False,
        trace: bool | TraceLevel | None = None,
        capabilities: Capabilities | bool | None = None,
        agent: Agent | None = None,
        tenant: str | None = None,
    ) -> Told:
        """Complete the arguments of `wrap` by their defaults and the environment variable `WHIFLASH_SDK_DISABLE`.

        Raises: ValueError for an empty tenant, and if the variable's value is neither yes nor no.
        """
        if tenant == "":
            raise ValueError("tenant: give a name, or None where no text is to be shared")
        disabled = os.environ.get("WHIFLASH_SDK_DISABLE", "")
        if disabled.lower() not in _FLAGS:
            raise ValueError(f"WHIFLASH_SDK_DISABLE: give 1 or 0, not {disabled!r}")
        if _FLAGS[disabled.lower()]:
            capabilities = False
        elif isinstance(capabilities, Capabilities):
            capabilities = capabilities.assumed()
        trace = True if trace in (None, "summary") else trace  # both are one level, so they must be equal
        return cls((hints or Hints()).over(Hints(trace=trace)), strict, capabilities, agent, tenant)


def route_of(path: str) -> str | None:
    """Return the route at the end of a POST's path if it may take hints; None for other routes."""
    path = path.partition("?")[0]
    return next((route for route in (*_DERIVED, *_CONVERTED) if path.endswith(f"/{route}")), None)


class Outgoing:
    """One request's body with hints, and without them, in case the server refuses the fields that were added.

    server: what is known about it; None if `told` has its capabilities.

    Raises: HintError for malformed hints of the call itself; UnsupportedServerError if the client is strict.
    """

    def __init__(self, body: Mapping[str, Any], route: str, told: Told, server: AskedServer | None) -> None:
        capabilities = _found(told, server, text_or_none(body.get("model")))
        self.body = self.plain = body
        self._strict, self._server, self._is_read = told.strict, server, False
        if _takes(capabilities, route):
            self.body = _with_hints(body, route, told, capabilities)
            self.plain = _with_hints(body, route, told, None)
        said = _said(self.body)
        self.agent: str | None = text_or_none(said.get("agent"))
        """The agent's name in the hints that are sent."""
        self.traced = bool(said.get("trace"))
        takes = isinstance(capabilities, Capabilities) and capabilities.previews
        self.previews = takes and route == _DERIVED[0]
        """Whether the server may prefill the prompt that follows this request."""
        self.whole_text = said.get("trace") == "full"
        """Whether the trace may count in the answer's text."""

    def refused(self, status: int, text: str) -> str | None:
        """Return the added field that the server's refusal names; None if it names none, or under `strict`.

        status, text: of the server's answer."""
        if status not in REFUSALS or self._strict:
            return None
        self._is_read = any(field in text for field in _INSIDE)
        if self._is_read and "cache_salt" in self.body:  # the tenant is no hint: it is sent again
            self.plain = {**self.plain, "cache_salt": self.body["cache_salt"]}
        added = (name for name in _ADDED if self.body.get(name) != self.plain.get(name))
        return next((name for name in added if name in text), None)

    def served_without(self, name: str) -> None:
        """Note that the request was served without our fields, and warn. Later requests to a server that does not know
        the field `name` are sent without hints."""
        self.traced = False
        if self._is_read:
            warn_unsupported(f"the server refuses what {name} says. The request was repeated without hints")
        elif self._server is not None:
            self._server.refused(name)
            self._server.require(None, strict=False)
        else:
            warn_unsupported(
                f"the server refuses {name}, though the capabilities given to `wrap` allow it. The request was "
                "repeated without hints"
            )


def at_once(does: Callable[..., ResultT], *args: Any) -> ResultT:
    """Call a function as a step of a flow, in this thread."""
    return does(*args)


def exchange(
    owner: Any,
    told: Told,
    route: str,
    body: Mapping[str, Any],
    *,
    asker: Asker,
    timeout: Any = None,
    is_async: bool,
    send: Callable[[Mapping[str, Any]], Flow[Any]],
    take: Callable[..., None],
    work: Callable[..., Any] = at_once,
    fails: type[Exception] = Exception,
) -> Flow[Any]:
    """Send a request with hints, again without them if they are refused, and return the answer. It is a `flow.Flow`.

    owner: the client whose `collect` blocks see the call.
    asker: asks for the server's capabilities and closes the session. timeout: for asking.
    is_async: whether the steps are awaited.
    send: sends a body and returns the answer; for a refusal it raises `fails` with the `response`.
    take: reads the answer's traces.
    work: the step that calls a function whose time grows with the body.
    """
    if _said(body).get("preview"):
        return (yield from send(body))
    model, server = text_or_none(body.get("model")), None
    if told.capabilities is None:
        server = yield (async_ask if is_async else ask)(asker, timeout, model)
    going = yield work(Outgoing, body, route, told, server)
    talk, sent = conversation(), going.body.get("session_id")
    if talk is not None and isinstance(sent, str) and sent.startswith(talk.id):
        talk.sent_to(asker, sent, going.body, is_async=is_async)
    call = start(owner, going.agent)
    turn = turn_of(asker, going.body, is_async=is_async) if going.previews else None
    try:
        answer = yield from send(going.body)
    except fails as error:
        response: Any = getattr(error, "response", None)
        text = getattr(response, "text", None)  # in others' exceptions it may be a dictionary or a method
        refused = going.refused(response.status_code, text) if isinstance(text, str) else None
        if refused is None:
            raise
        answer = yield from send(going.plain)
        going.served_without(refused)
        turn = None
    if going.traced or turn is not None:
        call.turn = turn
        take(answer, call, whole_text=going.whole_text or turn is not None)
    return answer


def _found(told: Told, server: AskedServer | None, model: str | None) -> Capabilities | bool | None:
    """Return the capabilities for a request for this model. True: only the caller says that the server takes hints.
    None or False: hints must not be sent."""
    capabilities = told.capabilities
    if server is not None:
        return server.require(model, strict=told.strict)
    if isinstance(capabilities, Capabilities) and capabilities.model not in ("", model):
        return None
    return capabilities


def _takes(capabilities: Capabilities | bool | None, route: str) -> bool:
    """Whether requests of this route may have fields of ours, given the server's capabilities."""
    if route in _DERIVED:
        return True
    if isinstance(capabilities, Capabilities):
        return route.removeprefix("v1/") in capabilities.routes
    return bool(capabilities)


def _said(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the hints in a body as JSON; empty if they are malformed, which the server will refuse."""
    params = body.get("custom_params")
    sent = params.get(WIRE_KEY) if isinstance(params, Mapping) else None
    hints = json_or_none(sent) if isinstance(sent, str) else None
    return hints if isinstance(hints, Mapping) else {}


def _with_hints(
    body: Mapping[str, Any], route: str, told: Told, capabilities: Capabilities | bool | None
) -> Mapping[str, Any]:
    """Return the body with its final hints, prediction and tenant; without hints if `capabilities` are falsy.

    told: the wrapped client's settings. capabilities: True if the server's parsers are not known.
    """
    params = body.get("custom_params")
    if params is not None and not isinstance(params, Mapping):
        return body  # malformed: the server will refuse it
    rest = {name: value for name, value in body.items() if name != "custom_params"}
    params = dict(params or {})
    carried = params.pop(WIRE_KEY, None)
    if capabilities:
        inside = session()
        hints = block_hints().over(told.hints)
        if carried is not None:
            hints = decode(carried).over(hints)
        if "agent" not in hints.model_fields_set and (name := guessed(name_of, told.agent, otherwise=None)):
            hints = Hints(agent=name).over(hints)
        if opened := opened_span():
            others = hints.spans or guessed(_derived, rest, route, hints, capabilities, otherwise=())
            hints = hints.model_copy(update={"spans": open_first(tuple(others), opened)})
        params[WIRE_KEY] = hints.encode()
        rest = {**_predicted(capabilities, body, inside), **rest, **salted(body, told)}
        rest = {**_named(capabilities, body, hints.agent), **rest}
    return {**rest, "custom_params": params} if params else rest


def _derived(body: Mapping[str, Any], route: str, hints: Hints, capabilities: Capabilities | bool) -> tuple[Span, ...]:
    """Derive the spans to send beside a block's span: the server infers none for a request that has spans."""
    if not (hints.infer and isinstance(capabilities, Capabilities) and route in _DERIVED):
        return ()
    return derive_spans(body, capabilities.tool_call_parser, capabilities.reasoning_parser)


def salted(body: Mapping[str, Any], told: Told) -> dict[str, Any]:
    """Return the tenant as the field `cache_salt`; empty without a tenant, or if the request has a salt."""
    inside = session()
    tenant = (inside.tenant if inside else None) or told.tenant
    return {} if tenant is None or body.get("cache_salt") is not None else {"cache_salt": tenant}


def _named(capabilities: Capabilities | bool, body: Mapping[str, Any], agent: str | None) -> dict[str, Any]:
    """Return the enclosing session as the field `session_id`; empty without one, if the request names a session, or if
    the server keeps none. agent: of the request; another agent than the session's has a conversation of its own."""
    sessions = capabilities.sessions if isinstance(capabilities, Capabilities) else True
    talk = conversation() if sessions and "session_params" not in body else None
    if talk is None:
        return {}
    same = not talk.agent or agent in (None, talk.hints().agent)
    return {"session_id": talk.id if same else f"{talk.id}/{agent}"}


def _predicted(capabilities: Capabilities | bool, body: Mapping[str, Any], inside: Session | None) -> dict[str, Any]:
    """Return the field `prediction` of the enclosing block or session; empty if the request has one, or if the server
    reads none."""
    assumed = capabilities if isinstance(capabilities, Capabilities) else Capabilities(version=1).assumed()
    if "prediction" in body or assumed.prediction_tokens == 0:
        return {}
    parser = assumed.tool_call_parser
    text = predicted_text(lambda: guessed(inside.prediction, body, parser, otherwise=None) if inside else None)
    if text is None:
        return {}
    # A file may have been read with surrogates for bytes that are no text, which no request can carry.
    return {"prediction": {"type": "content", "content": text.encode(errors="replace").decode()}}

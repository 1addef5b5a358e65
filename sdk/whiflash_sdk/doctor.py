"""Diagnoses why hints have no effect: `doctor` checks a client and its server, `explain` an answer's trace.

print(*whiflash_sdk.doctor(client), sep="\\n")
print(*whiflash_sdk.explain(response), sep="\\n")
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from whiflash_sdk import presets
from whiflash_sdk.capabilities import AskedServer, Capabilities, ask, async_ask
from whiflash_sdk.client import settings_below, settings_of
from whiflash_sdk.identity import OfClient
from whiflash_sdk.outgoing import Told
from whiflash_sdk.trace import Trace, routing

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

_UNUSED: Final = {
    "prediction": "no draft was taken from one: send it with predict(…) or a Session; the answer may not follow it",
    "tools": "no draft was taken from calls: offer tools, and start the server with their --tool-call-parser",
}
"""Help by source of drafts, if nothing was taken from it."""


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    name: of the check. ok: whether hints can have an effect; None: nothing shows it. detail: what was found, and
    what would help.
    """

    name: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        sign = {True: "ok  ", False: "FAIL", None: "-   "}[self.ok]
        return f"{sign} {self.name}: {self.detail}"


def doctor(client: OpenAI, model: str | None = None) -> list[Finding]:
    """Check that hints can have an effect: the client, its server, parsers and drafters. Nothing is generated.

    client: wrapped or not. model: that requests will name; None: any.

    Returns: findings in the order in which a request meets them; those after a failed one may be missing.
    """
    return list(_findings(client, ask(OfClient(client), model=model), model))


async def async_doctor(client: AsyncOpenAI, model: str | None = None) -> list[Finding]:
    """Check that hints can have an effect, for an async client (see `doctor`)."""
    return list(_findings(client, await async_ask(OfClient(client), model=model), model))


def _findings(client: Any, server: AskedServer, model: str | None) -> Iterator[Finding]:
    told = settings_of(client) or settings_below(client)
    yield _wrapped(told)
    answer = server.found
    if told is not None and told.capabilities:
        yield Finding("server", None, "not judged: wrap was given its capabilities")
        return
    if answer is None:
        fix = "Start it with `whiflash serve`, and let every proxy in between pass GET /whiflash/capabilities"
        yield Finding("server", False, f"{server.url} {server.trouble}. {fix}")
        return
    yield Finding("server", True, f"whiflash-sglang {answer.server_version}, policy {answer.policy}")
    alone = server.alone or model is None or answer.model in ("", model)
    detail = f"the server answers for {answer.model!r}"
    if not alone:
        detail += f", and requests for {model!r} go elsewhere: ask for {answer.model!r}"
    yield Finding("model", bool(alone), detail)
    if answer.tenant_header:
        detail = "a gateway's header X-WhiFlash-Tenant names the tenant; tenant= and cache_salt are ignored"
        yield Finding("tenant", None, detail)
    lacks = "session ids have no effect: start the server with --enable-session-radix-cache"
    detail = "prompts of open sessions are evicted last" if answer.sessions else lacks
    yield Finding("sessions", answer.sessions or None, detail)
    yield from _drafters(answer)
    yield from _parsers(answer)


def _wrapped(settings: Told | None) -> Finding:
    if settings is None:
        return Finding("client", False, "it sends no hints: call whiflash_sdk.wrap(client)")
    if settings.capabilities is False:
        return Finding("client", False, "hints are switched off: by capabilities=False, or WHIFLASH_SDK_DISABLE is set")
    if settings.hints.off:
        return Finding("client", False, "its hints say off=True: every answer is decoded without drafts")
    return Finding("client", True, "it sends hints")


def _drafters(answer: Capabilities) -> Iterator[Finding]:
    neural = [arm for arm in answer.arms if arm in ("ar", "diffusion", "uno")]
    yield Finding("drafters", bool(neural), ", ".join(neural) or "the server has loaded none")
    lacks = "nothing is copied: the server was started with --whiflash-lookup off"
    yield _either("copies", "lookup" in answer.arms, "answers are copied from prompts", lacks)
    lacks = "none is read: copies are off, or this device's drafters cannot read them, so leave them out"
    has = f"up to {answer.prediction_tokens} tokens are read"
    yield _either("predictions", answer.prediction_tokens > 0, has, lacks)
    lacks = "nothing is drafted from tools: the server was started with --whiflash-structure off"
    yield _either("structure", "structure" in answer.arms, "what tools and schemas force is drafted", lacks)


def _either(name: str, ok: bool, has: str, lacks: str) -> Finding:
    return Finding(name, ok, has if ok else lacks)


def _parsers(answer: Capabilities) -> Iterator[Finding]:
    parser = answer.tool_call_parser
    if parser is None:
        detail = "none is set, so spans of calls are not known: start the server with --tool-call-parser"
    elif parser not in presets.TOOL_CALL_PARSERS:
        detail = f"the SDK does not know {parser!r}; the server derives what it can. Name spans with Hints(spans=…)"
    else:
        detail = parser
    yield Finding("tool calls", parser in presets.TOOL_CALL_PARSERS, detail)


def explain(response: object, choice: int = 0) -> list[Finding]:
    """Explain from an answer's trace which effect each hint had, and what would help if it had none.

    response: as `routing` takes it. choice: index of the choice.

    Returns: findings; a failed one names a hint without effect. `ok` is None if a hint was not sent or too few drafts
    show its effect.

    Raises: TraceError, TypeError as `routing` does.
    """
    trace = routing(response, choice)
    if trace is None:
        help_ = "Wrap the client with trace=True, let gateways pass custom_params and sglext, and try doctor(client)"
        return [Finding("trace", False, f"the answer carries none. {help_}")]
    return list(_brought(trace))


def _brought(trace: Trace) -> Iterator[Finding]:
    yield Finding("trace", True, f"policy {trace.policy}, acceptance length {trace.acceptance_length:.2f}")
    for note in trace.notes:
        yield Finding("request", False, note)
    off, pinned, spans = (trace.reasons.get(reason, 0) for reason in ("off", "pin", "span"))
    plain = trace.arms["none"].rounds if "none" in trace.arms else 0
    detail = f"{trace.rounds - plain} of {trace.rounds} rounds drafted"
    if off:
        detail = f"{off} rounds did not draft, because the hints say off=True"
    elif trace.rounds and plain == trace.rounds:
        detail += ": no drafter was worth its time, or none is loaded. doctor(client) looks at the server"
    yield Finding("drafts", plain < trace.rounds if trace.rounds else None, detail)
    if pinned or spans:
        yield Finding("spans", True, f"{pinned + spans} of {trace.rounds} rounds were routed by a pin or preference")
    if not trace.sources:
        yield Finding(
            "sources",
            False if trace.rounds else None,
            "the server reports none: nothing was drafted, or the server is older than this SDK",
        )
        return
    for name in dict.fromkeys((*trace.sources, *_UNUSED)):
        told = trace.sources.get(name)
        if told is not None:
            useless = False if told.proposed >= 16 else None  # fewer drafts show nothing
            saved = "" if told.saved is None else f", {told.saved:.3f} s saved by estimate"
            detail = f"{told.accepted} of {told.proposed} drafts accepted{saved}"
            yield Finding(name, True if told.accepted else useless, detail)
        else:
            yield Finding(name, None, _UNUSED[name])

"""Why hints may have no effect: what a client, its server and the way between them allow.

for finding in whiflash_sdk.doctor(client):
    print(finding)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import presets
from whiflash_sdk.capabilities import Capabilities, Server, ask, async_ask
from whiflash_sdk.client import settings_of
from whiflash_sdk.identity import OfClient


@dataclass(frozen=True)
class Finding:
    """One thing that hints need.

    name: of what was looked at. ok: whether it is as hints need it. detail: what was found, and what would help.
    """

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name}: {self.detail}"


def doctor(client: OpenAI, model: str | None = None) -> list[Finding]:
    """Look at what hints need, from the client to the server's drafters; nothing is generated.

    client: wrapped or not. model: that requests will name; None: any.

    Returns: findings in the order in which a request meets them; those behind one that fails may be missing.
    """
    return list(_findings(client, ask(OfClient(client), model=model), model))


async def async_doctor(client: AsyncOpenAI, model: str | None = None) -> list[Finding]:
    """`doctor` for an async client."""
    return list(_findings(client, await async_ask(OfClient(client), model=model), model))


def _findings(client: Any, server: Server, model: str | None) -> Iterator[Finding]:
    yield _wrapped(client)
    found = server.found
    if found is None:
        help_ = "Start it with `whiflash serve`, and let what lies between pass GET /whiflash/capabilities"
        yield Finding("server", False, f"{server.url} {server.trouble}. {help_}")
        return
    yield Finding("server", True, f"whiflash-sglang {found.server_version}, policy {found.policy}")
    alone = server.alone or model is None or found.model in ("", model)
    detail = f"the server answers for {found.model!r}"
    if not alone:
        detail += f", and requests for {model!r} go elsewhere: ask for {found.model!r}"
    yield Finding("model", bool(alone), detail)
    yield from _drafters(found)
    yield from _parsers(found)


def _wrapped(client: Any) -> Finding:
    settings = settings_of(client)
    if settings is None:
        return Finding("client", False, "it sends no hints: call whiflash_sdk.wrap(client)")
    if settings.capabilities is False:
        return Finding(
            "client", False, "hints are switched off: by capabilities=False, or WHIFLASH_SDK_DISABLE is set"
        )
    if settings.hints.off:
        return Finding("client", False, "its hints say off=True: every answer is decoded without drafts")
    return Finding("client", True, "it sends hints")


def _drafters(found: Capabilities) -> Iterator[Finding]:
    neural = [arm for arm in found.arms if arm in ("ar", "diffusion")]
    yield Finding("drafters", bool(neural), ", ".join(neural) or "the server has loaded none")
    copies = "lookup" in found.arms
    detail = "answers are copied from prompts"
    if not copies:
        detail = "nothing is copied: the server was started with --whiflash-lookup off"
    yield Finding("copies", copies, detail)
    detail = f"up to {found.prediction_tokens} tokens are read"
    if not found.prediction_tokens:
        detail = "none is read: copies are off, or this device's drafters cannot read them, so leave them out"
    yield Finding("predictions", found.prediction_tokens > 0, detail)
    forced = "structure" in found.arms
    detail = "what tools and schemas force is drafted"
    if not forced:
        detail = "nothing is drafted from tools: the server was started with --whiflash-structure off"
    yield Finding("structure", forced, detail)


def _parsers(found: Capabilities) -> Iterator[Finding]:
    parser = found.tool_call_parser
    if parser is None:
        detail = "none is set, so spans of calls are not known: start the server with --tool-call-parser"
    elif parser not in presets.TOOL_CALL_PARSERS:
        detail = f"the SDK does not know {parser!r}; the server derives what it can. Name spans with Hints(spans=…)"
    else:
        detail = parser
    yield Finding("tool calls", parser in presets.TOOL_CALL_PARSERS, detail)

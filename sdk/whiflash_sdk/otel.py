"""Sets attributes on the OpenTelemetry span that is current when a call begins: the GenAI conventions', `whiflash.*`.

The SDK does not import OpenTelemetry: a program that traces has imported it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from whiflash_sdk.report import Share

_ADDING: Final = threading.Lock()


def current_span() -> Any:
    """Return the current OpenTelemetry span if it records; None without tracing."""
    api: Any = sys.modules.get("opentelemetry.trace")
    span = None if api is None else api.get_current_span()
    return span if span is not None and span.is_recording() else None


def untraced() -> AbstractContextManager[Any]:
    """Return a context in which OpenTelemetry's instrumentations record nothing, for the SDK's own questions."""
    tools: Any = sys.modules.get("opentelemetry.instrumentation.utils")
    return nullcontext() if tools is None else tools.suppress_instrumentation()


def add_to(span: Any, share: Share, call: tuple[str | None, str | None, str | None]) -> None:
    """Add an answer's figures to its span. They are added to those of other answers; attributes that were set stay.

    share: sums over the choices of the answer. call: id, model and agent of the answer. Id and model are set only on a
    span of a single inference, as the conventions say.
    """
    with _ADDING:
        if not span.is_recording():
            return
        held = getattr(span, "attributes", None) or {}
        names: dict[str, float | None] = {"rounds": share.rounds, "tokens": share.tokens}
        names |= {"seconds": share.seconds, "seconds_saved_estimate": share.saved}
        for arm, totals in share.arms.items():
            for name in ("rounds", "tokens", "proposed", "accepted"):
                names[f"arm.{arm}.{name}"] = getattr(totals, name)
        ours = {f"whiflash.{name}": value for name, value in names.items() if value is not None}
        sums = {name: held.get(name, 0) + value for name, value in ours.items()}
        sums["whiflash.acceptance_length"] = sums["whiflash.tokens"] / max(sums["whiflash.rounds"], 1)
        of_call = ("gen_ai.response.id", "gen_ai.response.model", "gen_ai.agent.name")
        chosen = list(zip(of_call, call, strict=True))[0 if _is_inference(span, held) else 2 :]
        new = {name: value for name, value in chosen if value is not None and name not in held}
        span.set_attributes({**new, **sums})


def _is_inference(span: Any, held: Mapping[str, Any]) -> bool:
    """Whether a span is of a single call of a model, and not of a request or an agent that makes several calls."""
    operation, kind = held.get("gen_ai.operation.name"), held.get("openinference.span.kind")
    if operation or kind:
        return operation in ("chat", "text_completion", "generate_content") or kind == "LLM"
    return getattr(getattr(span, "kind", None), "name", "") == "CLIENT"

"""Attributes on the OpenTelemetry span that is current when a call begins: the GenAI conventions', and `whiflash.*`.

Nothing of OpenTelemetry is needed: a program that traces has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from whiflash_sdk.report import Share


def current_span() -> Any:
    """The span that records here; None where nobody traces."""
    api: Any = sys.modules.get("opentelemetry.trace")
    span = None if api is None else api.get_current_span()
    return span if span is not None and span.is_recording() else None


def untraced() -> AbstractContextManager[Any]:
    """Instrumentations record nothing inside the block: a question of ours is no call of the program's."""
    tools: Any = sys.modules.get("opentelemetry.instrumentation.utils")
    return nullcontext() if tools is None else tools.suppress_instrumentation()


def attributes(share: Share, call: Mapping[str, str | None]) -> dict[str, str | int | float]:
    """Attributes of a span. share: sums over the choices of one answer. call: its id, model and agent."""
    found: dict[str, Any] = {
        "gen_ai.response.id": call["response_id"],
        "gen_ai.response.model": call["model"],
        "gen_ai.agent.name": call["agent"],
        "whiflash.rounds": share.rounds,
        "whiflash.tokens": share.tokens,
        "whiflash.acceptance_length": share.acceptance_length,
        "whiflash.seconds": share.seconds,
        "whiflash.seconds_saved_estimate": share.saved,
    }
    for arm, totals in share.arms.items():
        for name in ("rounds", "tokens", "proposed", "accepted"):
            found[f"whiflash.arm.{arm}.{name}"] = getattr(totals, name)
    return {name: value for name, value in found.items() if value is not None}

"""One request of a route that SGLang converts, or whose outputs are only added up, on its way to its answer."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

Form = Literal["chat", "completion", "responses", "messages", "native"]
"""The form of a request. A native one has `sampling_params`, which carry hints."""


@dataclass(slots=True)
class Call:
    """body: as SGLang parses it, without its texts; empty of a native one, and where SGLang will refuse it. params: its
    `custom_params`, with what other fields say. keys: whose text it is, where SGLang's model has no field for it.
    """

    form: Form
    body: Mapping[str, Any] = field(default_factory=dict)
    params: dict[str, Any] | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    # Filled by `generate_request` while outputs pass:
    traces: list[tuple[dict[str, Any], str | None]] = field(default_factory=list)
    """Traces of choices that have ended, with the texts that those with offsets count in."""
    counts: dict[int, dict[str, int]] = field(default_factory=dict)
    """Tokens of its predictions that appeared, by choice."""


CURRENT: ContextVar[Call | None] = ContextVar("whiflash_call", default=None)
"""The call that is served; None on other routes, over gRPC and in an `Engine`."""

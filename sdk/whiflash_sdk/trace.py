"""The routing trace: which drafter wrote what, why, and what it bought.

The server puts it into the response as `sglext.whiflash` (OpenAI routes) or `meta_info.whiflash`
(native route); the schema is documented in `docs/hints.md`. Positions are output token offsets,
half-open. Token 0 comes from the prefill: it belongs to no round, so to no stretch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from whiflash_sdk.errors import TraceError


def _ratio(tokens: int, rounds: int) -> float:
    return tokens / rounds if rounds else 0.0


class Stretch(BaseModel):
    """Consecutive rounds of one drafter, chosen for one reason, in one span.

    start, end: output token offsets.
    arm: the drafter; `none` is plain decoding.
    rounds: verification passes of the target.
    accepted: draft tokens accepted, bonus tokens not counted.
    reason: what decided, e.g. `score`, `policy`, `span`, `pin`, `off`.
    span: kind of the open span, or None.
    text: the text of these tokens, where the server can cut it.
    round_tokens: tokens committed by each round, the bonus token counted, where the server tells.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    arm: str
    rounds: int = Field(ge=0)
    accepted: int = Field(ge=0)
    reason: str = ""
    span: str | None = None
    text: str | None = None
    round_tokens: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Output tokens of the stretch."""
        return self.end - self.start

    @property
    def acceptance_length(self) -> float:
        """Tokens per round, the bonus token counted."""
        return _ratio(self.tokens, self.rounds)


class ArmTotals(BaseModel):
    """One drafter's share of a response."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rounds: int = Field(ge=0)
    tokens: int = Field(ge=0)

    @property
    def acceptance_length(self) -> float:
        """Tokens per round, the bonus token counted."""
        return _ratio(self.tokens, self.rounds)


class Trace(BaseModel):
    """The routing of one choice of one response.

    version: of the schema, 1.
    policy: the routing policy in force.
    stretches: in output order.
    rounds, tokens: totals; tokens committed by rounds, bonus tokens counted.
    switches: changes of drafter from one round to the next.
    arms: totals by drafter.
    choice: index of the choice this trace belongs to.
    prefill_text: the text before the first stretch, where the server can cut it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int
    policy: str
    stretches: tuple[Stretch, ...] = ()
    rounds: int = Field(ge=0)
    tokens: int = Field(ge=0)
    switches: int = Field(default=0, ge=0)
    arms: dict[str, ArmTotals] = Field(default_factory=dict)
    choice: int = Field(default=0, ge=0)
    prefill_text: str | None = None

    @property
    def acceptance_length(self) -> float:
        """Tokens per round, the bonus token counted."""
        return _ratio(self.tokens, self.rounds)


def routing(response: object, choice: int = 0) -> Trace | None:
    """The trace that came with a response; None if it carries none.

    response: a chat or text completion, parsed or raw, a stream chunk, a `TracedStream`, or the JSON
        of any of them, the native route's included. In a stream the last trace seen is the whole one.
    choice: index of the choice, for requests with `n` above 1.

    Raises: TraceError if there is a trace that does not follow the schema.
    """
    for found in raw_traces(response):
        trace = parse_trace(found)
        if trace.choice == choice:
            return trace
    return None


def parse_trace(raw: object) -> Trace:
    """One trace as the server sent it. Raises: TraceError if it does not follow the schema."""
    try:
        trace = Trace.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise TraceError(f"trace.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if trace.version != 1:
        raise TraceError(f"trace.version: this SDK reads version 1, not {trace.version}; update whiflash-sdk")
    return trace


def raw_traces(response: Any) -> list[Any]:
    """The traces a response carries, one a choice, unread."""
    if isinstance(response, Mapping):
        fields: Mapping[str, Any] = response
    else:
        traces = getattr(response, "raw_traces", None)
        if traces is not None:
            return list(traces)
        if not isinstance(response, BaseModel) and hasattr(response, "parse"):
            response = response.parse()  # a raw response
        fields = getattr(response, "model_extra", None) or {}
    for name in ("sglext", "meta_info"):
        extension = fields.get(name)
        found = extension.get("whiflash") if isinstance(extension, Mapping) else None
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []

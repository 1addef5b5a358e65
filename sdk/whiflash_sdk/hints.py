"""Hints: what an agent knows about the text it is going to get.

The wire format is `docs/reference/hints.md`; the server's reader is `whiflash_sglang.spans.hints`. A request
carries one JSON string in SGLang's `custom_params`, which nests two levels at most.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from whiflash_sdk.errors import HintError

Kind = Literal["tool_call", "json", "code", "reasoning", "prose"]
"""What is written inside a span."""
Arm = Literal["ar", "diffusion", "lookup", "structure", "none"]
"""What may draft: EAGLE-3, DFlash, copying, what a grammar forces, nothing."""
LookupScope = Literal["memory", "context", "off"]
"""What may be copied into an answer."""
TraceLevel = Literal["summary", "full"]
"""How much of the routing comes back: sums by drafter, or every stretch."""

WIRE_KEY: Final = "whiflash"
INFERRED_KEY: Final = "whiflash_inferred"
"""Beside it: the spans are the SDK's guess, which the server does not count as the caller's."""
AGENT_FIELD: Final = "agent-id"
"""AgentSpec's field of a request's body for the hint `agent` (arXiv 2608.24004)."""
MAX_SPANS: Final = 16
MAX_MARKER_CHARS: Final = 64
MAX_BYTES: Final = 8192
MAX_BIAS: Final = 16.0
MAX_NAME_CHARS: Final = 64
MAX_BLOCKS: Final = 16
MAX_QUERY: Final = 2**31 - 1
SCOPES: Final = ("agent", "query", "structure")
"""Hints that say where in an agent's work a text belongs: servers of before know none of them."""

Marker = Annotated[str, Field(min_length=1, max_length=MAX_MARKER_CHARS)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
QueryNumber = Annotated[int, Field(ge=0, le=MAX_QUERY)]
BiasAmount = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS, allow_inf_nan=False)]


Block = Annotated[tuple[Marker, Marker | None], Field(strict=False)]
"""Begin marker and end marker; None: it lasts to the end of the answer."""


class Span(BaseModel):
    """A kind of stretch that the output may contain, found by literal markers (no patterns).

    kind: what is written inside.
    begin: text of 1 to 64 characters that opens it; may be left out if `open`.
    end: text of 1 to 64 characters that closes it; without one it lasts to the end of the output.
    open: the output starts inside this span.
    prefer: arm to favour inside it.
    pin: use `prefer` for every round inside it.
    bias: expected accepted tokens, -16 to 16, to add to an arm's score inside it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Kind
    begin: Marker | None = None
    end: Marker | None = None
    open: bool = False
    prefer: Arm | None = None
    pin: bool = False
    bias: dict[Arm, BiasAmount] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Span:
        if self.begin is None and not self.open:
            raise ValueError("give begin, or set open to start inside the span")
        if self.pin and self.prefer is None:
            raise ValueError("pin needs prefer: the arm to use")
        return self


class Hints(BaseModel):
    """What one request says about its routing; only the fields that are set override outer levels.

    version: of this format.
    spans: kinds of text in the output, at most 16; of spans that open together the first listed is active.
    off: decode without drafting.
    infer: without spans, let the SDK and the server infer them from the request.
    trace: ask for the routing trace. True is "summary", sums by drafter; "full" has the stretches.
    lookup: sources of copies: `memory` (the request's context, and recent outputs of the same cache salt if the server
        keeps them), `context` (the request's context; nothing is kept), `off`.
    agent: name of the agent, 1 to 64 characters; its earlier outputs are copied from first.
    query: name (1 to 64 characters) or number of the agent's prompt.
    structure: blocks of the agent's answers, at most 16, each a begin marker and an end marker or null; copies come
        first from the same block. Default: the spans.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    spans: Annotated[Sequence[Span], Field(max_length=MAX_SPANS), AfterValidator(tuple)] = ()
    off: bool = False
    infer: bool = True
    trace: bool | TraceLevel = False
    lookup: LookupScope = "memory"
    agent: Name | None = None
    query: Name | QueryNumber | None = None
    structure: Annotated[Sequence[Block], Field(max_length=MAX_BLOCKS), AfterValidator(tuple)] = ()

    def encode(self) -> str:
        """The JSON string for `custom_params`. Raises: HintError if it is longer than 8 KiB.

        Every field that was set is written, defaults too: `off=False` on a call must override a client's `off`.
        """
        fields = {name: value for name, value in self if name in self.model_fields_set}
        if "spans" in fields:
            fields["spans"] = [span.model_dump(exclude_defaults=True) for span in self.spans]
        if fields.get("trace") == "summary":
            fields["trace"] = True  # what servers of before understand too
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        if len(text.encode()) > MAX_BYTES:
            raise HintError(f"hints take {len(text.encode())} bytes; at most {MAX_BYTES} are allowed")
        return text

    def custom_params(self) -> dict[str, str]:
        """SGLang's `custom_params` for a request that carries these hints."""
        return {WIRE_KEY: self.encode()}

    def extra_body(self, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`extra_body` for one call of the OpenAI client, and for every framework that passes one on.

        others: what else is to go there; it is not changed. Its `custom_params` keep what is not ours.

        Raises: HintError if the hints are too long, or the others' `custom_params` no mapping.
        """
        body = dict(others or {})
        params = body.get("custom_params") or {}
        if not isinstance(params, Mapping):
            raise HintError(f"custom_params: hints go into a mapping, not {type(params).__name__}")
        return {**body, "custom_params": {**params, **self.custom_params()}}

    def without(self, names: Iterable[str]) -> Hints:
        """These hints, with the fields of these names left unset."""
        kept = self.model_fields_set.difference(names)
        return (
            self if kept == self.model_fields_set else Hints(**{name: getattr(self, name) for name in kept})
        )

    def over(self, outer: Hints) -> Hints:
        """These hints, with what they leave unset taken from `outer`."""
        return outer.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})


def decode(text: object) -> Hints:
    """Read hints back from `custom_params`. Raises: HintError naming the field that is wrong."""
    try:
        return Hints.model_validate_json(text)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, (WIRE_KEY, *first["loc"])))
        raise HintError(f"{where}: {first['msg']}") from None

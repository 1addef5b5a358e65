"""Hints: what an agent knows in advance about the text of the answer.

The wire format is `docs/reference/hints.md`. These models are its only schema: the server validates with them, too,
after it has bounded the text (`whiflash_sglang.spans.hints`). A request carries one JSON string in SGLang's
`custom_params`, which nests two levels at most.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from whiflash_sdk.errors import HintError

Kind = Literal["tool_call", "json", "code", "reasoning", "prose"]
"""Kind of the text inside a span."""
Arm = Literal["ar", "diffusion", "lookup", "structure", "uno", "none"]
"""Drafter: EAGLE-3, DFlash, copying, text that a grammar forces, UNO, or none."""
LookupScope = Literal["on", "context", "off"]
"""Texts that may be copied into an answer."""
TraceLevel = Literal["summary", "full"]
"""How much of the routing comes back: sums by drafter, or every stretch."""

WIRE_KEY: Final = "whiflash"
WIRE_VERSION: Final = 1
INFERRED_KEY: Final = "whiflash_inferred"
"""Key beside `WIRE_KEY`: the spans are the SDK's guess, and the server does not count them as the caller's."""
MAX_SPANS: Final = 16
MAX_MARKER_CHARS: Final = 64
MAX_BYTES: Final = 8192
MAX_BIAS: Final = 16.0
MAX_NAME_CHARS: Final = 64

Marker = Annotated[str, Field(min_length=1, max_length=MAX_MARKER_CHARS)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
BiasAmount = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS, allow_inf_nan=False)]


class _Hint(BaseModel):
    """Base model that raises HintError if it is constructed with a wrong field; validation raises pydantic's error."""

    if not TYPE_CHECKING:  # checkers see the fields

        def __init__(self, /, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                path, reason = first_fault(error, type(self))
                raise HintError(f"{type(self).__name__}{path}: {reason}") from None

        __init__.__pydantic_base_init__ = True  # so that validation does not call it


class Span(_Hint):
    """A kind of stretch that the output may contain, found by literal markers (no patterns).

    kind: what is written inside.
    begin: text of 1 to 64 characters that opens it; may be left out if `open`.
    end: text of 1 to 64 characters that closes it; without one it lasts to the end of the output.
    open: the output starts inside this span.
    prefer: arm to favour inside it.
    pin: use `prefer` for every round inside it.
    bias: expected accepted tokens, -16 to 16, to add to an arm's score inside it.

    Raises: HintError for what the server would refuse, as `Hints` does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Kind
    begin: Marker | None = None
    end: Marker | None = None
    open: bool = False
    prefer: Arm | None = None
    pin: bool = False
    bias: Annotated[dict[Arm, BiasAmount], BeforeValidator(lambda value: {} if value is None else value)] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _complete(self) -> Span:
        if self.begin is None and not self.open:
            raise PydanticCustomError("begin", "is missing; give a marker, or set open to start inside the span")
        if self.pin and self.prefer is None:
            raise PydanticCustomError("prefer", "is missing; pin needs the arm to use")
        return self


class Hints(_Hint):
    """A request's wishes for its routing; only the fields that are set override outer levels.

    version: of this format.
    spans: kinds of text in the output, at most 16; of spans that open together the first listed is active.
    off: decode without drafting.
    infer: without spans, let the SDK and the server infer them from the request.
    trace: ask for the routing trace. True is "summary", sums by drafter; "full" has the stretches.
    lookup: `on`: text is copied; `off`: nothing is; `context`: only the request's own text is, and none of it is kept.
    agent: name of the agent, 1 to 64 characters, by which reports count.
    task: name of the task, 1 to 64 characters: requests of a tenant with one name copy from each other's answers.
    learn: false keeps the request from a server that trains its drafters on what it serves.
    preview: text of 1 to 64 characters in the prompt, where text follows that is not known yet. The prompt before it is
        prefilled for the session's next request, at the lowest priority, and nothing is answered.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Annotated[int, Field(ge=WIRE_VERSION, le=WIRE_VERSION)] = WIRE_VERSION
    spans: Annotated[Sequence[Span], Field(max_length=MAX_SPANS), AfterValidator(tuple)] = ()
    off: bool = False
    infer: bool = True
    trace: bool | TraceLevel = False
    lookup: Annotated[LookupScope, BeforeValidator(lambda value: "on" if value is None else value)] = "on"
    agent: Name | None = None
    task: Name | None = None
    learn: bool = True
    preview: Marker | None = None

    def encode(self) -> str:
        """Return the JSON string for `custom_params`. Raises: HintError if it is longer than 8 KiB.

        Every field that was set is written, defaults too: `off=False` on a call must override a client's `off`.
        """
        fields = {name: value for name, value in self if name in self.model_fields_set}
        if "spans" in fields:
            fields["spans"] = [span.model_dump(exclude_defaults=True) for span in self.spans]
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        if len(text.encode()) > MAX_BYTES:
            raise HintError(f"hints take {len(text.encode())} bytes; at most {MAX_BYTES} are allowed")
        return text

    def custom_params(self) -> dict[str, str]:
        """Return SGLang's `custom_params` for a request with these hints."""
        return {WIRE_KEY: self.encode()}

    def extra_body(self, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return `extra_body` for one call of the OpenAI client, or of a framework that passes it on.

        others: further fields, which are not changed; their `custom_params` are kept beside ours.

        Raises: HintError if the hints are too long, or if the `custom_params` in `others` are no mapping.
        """
        body = dict(others or {})
        params = body.get("custom_params") or {}
        if not isinstance(params, Mapping):
            raise HintError(f"custom_params: hints go into a mapping, not {type(params).__name__}")
        return {**body, "custom_params": {**params, **self.custom_params()}}

    def over(self, outer: Hints) -> Hints:
        """Return these hints; fields that are not set are taken from `outer`."""
        return outer.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})


def name_sent(name: str) -> str:
    """Return an agent's name as the hint sends it: the last 64 characters, where paths differ; `?` for surrogates."""
    return name[-MAX_NAME_CHARS:].encode(errors="replace").decode()


def decode(text: object) -> Hints:
    """Read hints back from `custom_params`. Raises: HintError naming the field that is wrong."""
    try:
        return Hints.model_validate_json(text)  # type: ignore[arg-type]
    except ValidationError as error:
        path, reason = first_fault(error)
        raise HintError(f"{WIRE_KEY}{path}: {reason}") from None


def first_fault(error: ValidationError, of: type[BaseModel] = Hints) -> tuple[str, str]:
    """Return the path of the first wrong field, such as `.spans[2].begin`, and what to change there.

    of: the model that was validated.
    """
    first = error.errors(include_url=False)[0]
    path, kind = list(first["loc"]), first["type"]
    if kind in ("begin", "prefer"):
        return f"{_path(path)}.{kind}", first["msg"]
    if kind == "extra_forbidden":
        fields = Span.model_fields if len(path) > 1 else of.model_fields
        return _path(path), f"is unknown; known are {', '.join(sorted(fields))}"
    if path[-1:] == ["[key]"]:
        return _path(path[:-1]), f"is unknown; known are {_words(first)}"
    if path and path[0] in _REASONS:
        return _path(path[:1]), _REASONS[str(path[0])]
    if kind not in _REASONS:
        return _path(path), first["msg"]
    length = len(first["input"]) if isinstance(first["input"], Sequence) else 0
    return _path(path), _REASONS[kind].format(words=_words(first), length=length, **first.get("ctx", {}))


_REASONS: Final = {
    "version": f"this server understands version {WIRE_VERSION}",
    "trace": "must be true, false, summary or full",
    "missing": "is missing",
    "literal_error": "must be one of {words}",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "string_too_short": "is empty; leave it out instead",
    "string_too_long": "is {length} characters long; at most {max_length} are allowed",
    "string_unicode": "holds a lone surrogate, which is not text",
    "sequence_type": "must be a list",
    "is_instance_of": "must be a list",
    "too_long": "holds {actual_length} entries; at most {max_length} are allowed",
    "model_type": "must be an object",
    "dict_type": "must be an object of arms and numbers",
    "float_type": "must be a number",
    **dict.fromkeys(
        ("greater_than_equal", "less_than_equal", "finite_number"), f"must be between {-MAX_BIAS:g} and {MAX_BIAS:g}"
    ),
}
"""Messages by the wrong field's name, or else by pydantic's type of error."""


def _words(error: ErrorDetails) -> str:
    return str(error.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ")


def _path(parts: Iterable[int | str]) -> str:
    """Join a field's path. Names come from a client, so they are cut, and other characters than ASCII are escaped."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{ascii(key[:32])[1:-1]}" for key in parts)

"""Routing hints on the wire: what a request may say about the spans of its output.

A request carries its hints in SGLang's `custom_params`, which nests two levels at most, so ours is
one string: `custom_params = {"whiflash": "<JSON object>"}`. The object, its fields and its bounds
are documented in `docs/reference/hints.md`; its schema is the SDK's (`whiflash_sdk.hints`).

`parse_hints` is the only reader, and caches what it read. It runs in the HTTP process before anything is scheduled, so
it raises nothing but `HintError`, and it measures a text before it decodes it: its work is bounded.
"""

import json
from functools import lru_cache
from typing import Any, Final, Literal, NoReturn, get_args

from pydantic import ValidationError
from whiflash_sdk.hints import INFERRED_KEY, MAX_BYTES, WIRE_KEY, Hints, TraceLevel, first_fault


class HintError(ValueError):
    """A hint that cannot be used: `field` is its path in the payload, `reason` says what to change."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def utf8(field: str, text: str) -> bytes:
    """Encode the text in UTF-8. Raises HintError, naming `field`, for a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise HintError(field, "holds a lone surrogate, which is not text") from None


def json_of(text: str) -> Any:
    """Load JSON and refuse a lone surrogate, which no tokenizer accepts. Any depth is allowed, as schemas nest deeply.

    Raises: ValueError, RecursionError.
    """
    value = json.loads(text)  # noqa: TID251
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


TOOLS_KEY: Final = "whiflash_tools"
"""Key of a request's tools, as the HTTP process passes them to the scheduler (`structure.tools`)."""
_FIELD: Final = f"custom_params.{WIRE_KEY}"
CARRIED_PREDICTION: Final = "whiflash_prediction"
"""Key of the output that the caller expects (`spans.prediction`): apart from the hints, since it may be long."""
CARRIED_FORCED: Final = "whiflash_forced"
"""Key of an answer that a benchmark forces (`spans.forced`): apart from the hints, since it may be long."""

HintSource = Literal["request", "inferred", "none", "malformed"]
"""The source of a request's hints: the caller, a guess of the server or the SDK, no hints, or unreadable ones."""
HINT_SOURCES: Final[tuple[HintSource, ...]] = get_args(HintSource)

MAX_TOOLS_CHARS: Final = 1 << 16
"""Characters of the longest list of tools that the HTTP process passes to the scheduler."""


class RequestHints(Hints):
    """The SDK's `Hints` of one request, with fields that the HTTP process adds and that are never part of the payload.

    trace: None if the request wants no trace. tools: JSON of the tools that may be called. inferred: whether `spans`
    are a guess and not the caller's own hints.
    """

    trace: TraceLevel | None = None  # type: ignore[assignment]  # true is a level here, false none
    tools: str = ""
    inferred: bool = False

    @property
    def source(self) -> HintSource:
        """Return the source of the hints: the request, if any hint is the caller's own."""
        if self.off or self.lookup != "on" or (self.spans and not self.inferred):
            return "request"
        return "inferred" if self.spans else "none"


def parse_hints(custom_params: object) -> RequestHints:
    """Return the hints in a request's `custom_params`; a default `RequestHints` if there are none.

    It reads only our own keys, so the scheduler may call this on parameters that SGLang has
    added private values to. Its work is bounded: at most `MAX_BYTES` are decoded.

    Raises: HintError, and nothing else, naming the field that is wrong.
    """
    if custom_params is None:
        return RequestHints()
    if not isinstance(custom_params, dict):
        raise HintError("custom_params", "must be an object")
    payload, tools = custom_params.get(WIRE_KEY), custom_params.get(TOOLS_KEY)
    hints = RequestHints()
    if payload is not None:
        if not isinstance(payload, str):
            raise HintError(_FIELD, "must be a string holding a JSON object (custom_params nests two levels only)")
        hints = _read(payload)
    implied = {"tools": tools if isinstance(tools, str) else "", "inferred": INFERRED_KEY in custom_params}
    return hints.model_copy(update=implied)


@lru_cache(maxsize=64)
def _read(payload: str) -> RequestHints:
    """Read a payload's hints. Cached, as a process reads them several times and an agent's requests repeat them."""
    return validated(_decode(payload), _FIELD)


def _decode(payload: str) -> dict[str, object]:
    if len(payload) > MAX_BYTES or (not payload.isascii() and len(utf8(_FIELD, payload)) > MAX_BYTES):
        raise HintError(_FIELD, f"is longer than {MAX_BYTES} bytes")
    try:
        decoded = json.loads(  # noqa: TID251  (looks at fields while it reads)
            payload, object_pairs_hook=_fields, parse_constant=_reject_constant
        )
    except HintError:
        raise
    except RecursionError:
        raise HintError(_FIELD, "is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and integers of more digits than Python converts
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise HintError(_FIELD, f"is not valid JSON{where}") from None
    if not isinstance(decoded, dict):
        raise HintError(_FIELD, "must hold a JSON object")
    return decoded


def _fields(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise HintError(_FIELD, "names a field twice")
    return fields


def _reject_constant(name: str) -> NoReturn:
    raise HintError(_FIELD, f"holds {name}, which is not a number JSON allows")


def validated(raw: object, field: str) -> RequestHints:
    """Validate a decoded payload by the SDK's models; return its hints. field: the payload's name in an error.

    Raises: HintError, and nothing else, naming the field that is wrong.
    """
    try:
        read = Hints.model_validate(raw)
    except ValidationError as error:
        path, reason = first_fault(error)
        raise HintError(f"{field}{path}", reason) from None
    level = "summary" if read.trace is True else read.trace or None
    return RequestHints.model_construct(**dict(read) | {"trace": level})

"""Routing hints on the wire: what a request may say about the spans it is going to write.

A request carries its hints in SGLang's `custom_params`, which nests two levels at most, so ours is
one string: `custom_params = {"whiflash": "<JSON object>"}`. The object, its fields and its bounds
are documented in `docs/reference/hints.md`; `whiflash_sdk.hints` is the client's side of the same format.

`parse_hints` is the only reader. It runs in the HTTP process before anything is scheduled, so it
raises nothing but `HintError` and its work is bounded before it starts: the text is measured before
it is decoded, and decoding stops at the first object too many.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal, NoReturn, TypeVar

WIRE_KEY: Final = "whiflash"
TOOLS_KEY: Final = "whiflash_tools"
"""What the HTTP process tells the scheduler of a request's tools (`structure.calls`)."""
_FIELD: Final = f"custom_params.{WIRE_KEY}"
WIRE_VERSION: Final = 1
CARRIED_PREDICTION: Final = "whiflash_prediction"
"""Beside our own key, since it may be long: what the caller expects back (`spans.prediction`)."""
CARRIED_FORCED: Final = "whiflash_forced"
"""The same for an answer that a benchmark forces (`spans.forced`)."""

KINDS: Final = ("tool_call", "json", "code", "reasoning", "prose")
ARMS: Final = ("ar", "diffusion", "lookup", "none")

TraceLevel = Literal["summary", "full"]
TRACE_LEVELS: Final[tuple[TraceLevel, ...]] = ("summary", "full")

LookupScope = Literal["memory", "context", "off"]
LOOKUP_SCOPES: Final[tuple[LookupScope, ...]] = ("memory", "context", "off")

MAX_TOOLS_CHARS: Final = 1 << 16
"""Longer lists of tools are told to nobody."""

MAX_SPANS: Final = 16
MAX_MARKER_CHARS: Final = 64
MAX_BYTES: Final = 8192
MAX_BIAS: Final = 16.0  # expected accepted tokens; hardly any round accepts more

# The request, its spans and their biases: a well-formed payload holds no more objects than this.
_MAX_OBJECTS: Final = 1 + 2 * MAX_SPANS
_MAX_CARRIER_VALUES: Final = 1024
_MAX_CARRIER_CHARS: Final = 16384

_REQUEST_FIELDS: Final = frozenset({"version", "off", "infer", "trace", "lookup", "spans"})
_SPAN_FIELDS: Final = frozenset({"kind", "begin", "end", "open", "prefer", "pin", "bias"})

Bias = tuple[tuple[str, float], ...]
_Word = TypeVar("_Word", bound=str)


class HintError(ValueError):
    """A hint that cannot be used: `field` is its path in the payload, `reason` says what to change."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SpanHint:
    """One kind of stretch the output may contain, found by literal markers.

    kind: one of `KINDS`.
    begin: text that opens the span; None if only `open` opens it.
    end: text that closes it; None if it never closes.
    open: the span is open before the first output token.
    prefer: arm to favour inside the span, one of `ARMS`.
    pin: use `prefer` for every round inside the span, whatever the scores say.
    bias: (arm, expected accepted tokens to add to that arm's score), sorted by arm.
    """

    kind: str
    begin: str | None = None
    end: str | None = None
    open: bool = False
    prefer: str | None = None
    pin: bool = False
    bias: Bias = ()


@dataclass(frozen=True, slots=True)
class RequestHints:
    """What one request says about its own routing. Hashable: requests with equal hints compare equal.

    spans: at most `MAX_SPANS`; among spans that open at the same byte the first listed is active.
    off: decode this request without drafting.
    infer: where `spans` is empty, let the server infer them from the request and its parsers.
    trace: return the routing trace with the response, in sums or with its stretches.
    lookup: what may be copied: `memory` (its own context, and its tenant's recent outputs where the server keeps
        them), `context` (its own context; nothing of it is kept either), `off`.
    tools: what the HTTP process says of the request's tools; no hint of the caller's, never part of the payload.
    """

    spans: tuple[SpanHint, ...] = ()
    off: bool = False
    infer: bool = True
    trace: TraceLevel | None = None
    lookup: LookupScope = "memory"
    tools: str = ""


def parse_hints(custom_params: object) -> RequestHints:
    """The hints in a request's `custom_params`; the default `RequestHints` where it has none.

    Only our own key is looked at, so the scheduler may call this on parameters that SGLang has
    added private values to. Its work is bounded whatever the payload: `MAX_BYTES` are decoded, no more objects kept
    than a well-formed request holds.

    Raises: HintError, and nothing else, naming the field that is wrong.
    """
    if custom_params is None:
        return RequestHints()
    if not isinstance(custom_params, dict):
        raise HintError("custom_params", "must be an object")
    payload, tools = custom_params.get(WIRE_KEY), custom_params.get(TOOLS_KEY)
    hints = RequestHints() if payload is None else _request(_decode(payload))
    return replace(hints, tools=tools) if isinstance(tools, str) else hints


def validate_custom_params(custom_params: object) -> RequestHints:
    """`parse_hints`, after checking that the rest of `custom_params` can reach the scheduler at all.

    SGLang sends it on as msgpack and decodes it as scalars, lists of scalars and objects of scalars;
    anything else fails inside the scheduler instead of being refused. For the HTTP process only.

    Raises: HintError, and nothing else, naming the field that is wrong.
    """
    hints = parse_hints(custom_params)
    if isinstance(custom_params, dict):
        _check_carrier(custom_params)
    return hints


def resolve(explicit: RequestHints, inferred: RequestHints) -> RequestHints:
    """The hints to route by: the request's own spans, else the inferred ones where it allows them."""
    spans = explicit.spans or (inferred.spans if explicit.infer else ())
    return replace(explicit, spans=spans)


def capabilities(
    *,
    server_version: str,
    model: str,
    policy: str,
    arms: Iterable[str],
    prediction_tokens: int,
    tool_call_parser: str | None,
    reasoning_parser: str | None,
) -> dict[str, object]:
    """The body of `GET /whiflash/capabilities`, by which a client learns that hints are understood."""
    return {
        "version": WIRE_VERSION,
        "server_version": server_version,
        "model": model,
        "policy": policy,
        "arms": list(arms),
        "kinds": list(KINDS),
        "traces": list(TRACE_LEVELS),
        "prediction_tokens": prediction_tokens,
        "tool_call_parser": tool_call_parser,
        "reasoning_parser": reasoning_parser,
        "limits": {"spans": MAX_SPANS, "marker_chars": MAX_MARKER_CHARS, "bytes": MAX_BYTES},
    }


def _decode(payload: object) -> dict[str, object]:
    if not isinstance(payload, str):
        raise HintError(
            _FIELD, "must be a string holding a JSON object (custom_params nests two levels only)"
        )
    if len(payload) > MAX_BYTES or (not payload.isascii() and len(_utf8(_FIELD, payload)) > MAX_BYTES):
        raise HintError(_FIELD, f"is longer than {MAX_BYTES} bytes")
    objects = 0

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal objects
        objects += 1
        if objects > _MAX_OBJECTS:
            raise HintError(_FIELD, f"holds more than {_MAX_OBJECTS} objects")
        found = dict(pairs)
        if len(found) != len(pairs):
            raise HintError(_FIELD, "names a field twice")
        return found

    try:
        decoded = json.loads(payload, object_pairs_hook=collect, parse_constant=_reject_constant)
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


def _reject_constant(name: str) -> NoReturn:
    raise HintError(_FIELD, f"holds {name}, which is not a number JSON allows")


def _request(raw: dict[str, object]) -> RequestHints:
    _refuse_unknown(_FIELD, raw, _REQUEST_FIELDS)
    version = raw.get("version", WIRE_VERSION)
    if type(version) is not int or version != WIRE_VERSION:
        raise HintError(f"{_FIELD}.version", f"this server understands version {WIRE_VERSION}")
    spans = raw.get("spans", [])
    if not isinstance(spans, list):
        raise HintError(f"{_FIELD}.spans", "must be a list")
    if len(spans) > MAX_SPANS:
        raise HintError(f"{_FIELD}.spans", f"holds {len(spans)} spans; at most {MAX_SPANS} are allowed")
    return RequestHints(
        spans=tuple(_span(f"{_FIELD}.spans[{i}]", span) for i, span in enumerate(spans)),
        off=_flag(_FIELD, raw, "off", default=False),
        infer=_flag(_FIELD, raw, "infer", default=True),
        trace=_trace_level(raw.get("trace", False)),
        lookup=_choice(f"{_FIELD}.lookup", raw.get("lookup"), LOOKUP_SCOPES) or "memory",
    )


def _span(field: str, raw: object) -> SpanHint:
    if not isinstance(raw, dict):
        raise HintError(field, "must be an object")
    _refuse_unknown(field, raw, _SPAN_FIELDS)
    kind = _choice(f"{field}.kind", raw.get("kind"), KINDS)
    if kind is None:
        raise HintError(f"{field}.kind", f"is missing; give one of {', '.join(KINDS)}")
    span = SpanHint(
        kind=kind,
        begin=_marker(f"{field}.begin", raw.get("begin")),
        end=_marker(f"{field}.end", raw.get("end")),
        open=_flag(field, raw, "open", default=False),
        prefer=_choice(f"{field}.prefer", raw.get("prefer"), ARMS),
        pin=_flag(field, raw, "pin", default=False),
        bias=_bias(f"{field}.bias", raw.get("bias")),
    )
    if span.begin is None and not span.open:
        raise HintError(f"{field}.begin", "is missing; give a marker, or set open to start inside the span")
    if span.pin and span.prefer is None:
        raise HintError(f"{field}.prefer", "is missing; pin needs the arm to use")
    return span


def _refuse_unknown(field: str, raw: dict[str, object], known: frozenset[str]) -> None:
    for name in raw:
        if name not in known:
            raise HintError(
                f"{field}.{ascii(name[:32])[1:-1]}", f"is unknown; known are {', '.join(sorted(known))}"
            )


def _flag(field: str, raw: dict[str, object], name: str, *, default: bool) -> bool:
    value = raw.get(name, default)
    if not isinstance(value, bool):
        raise HintError(f"{field}.{name}", "must be true or false")
    return value


def _trace_level(value: object) -> TraceLevel | None:
    if isinstance(value, bool):
        return "summary" if value else None
    for level in TRACE_LEVELS:
        if value == level:
            return level
    raise HintError(f"{_FIELD}.trace", f"must be true, false, {' or '.join(TRACE_LEVELS)}")


def _choice(field: str, value: object, allowed: tuple[_Word, ...]) -> _Word | None:
    if value is None:
        return None
    for word in allowed:
        if value == word:
            return word
    raise HintError(field, f"must be one of {', '.join(allowed)}")


def _marker(field: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise HintError(field, "must be a string")
    if not value:
        raise HintError(field, "is empty; leave it out instead")
    if len(value) > MAX_MARKER_CHARS:
        raise HintError(field, f"is {len(value)} characters long; at most {MAX_MARKER_CHARS} are allowed")
    _utf8(field, value)
    return value


def _bias(field: str, value: object) -> Bias:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise HintError(field, "must be an object of arms and numbers")
    _refuse_unknown(field, value, frozenset(ARMS))
    pairs = []
    for arm, amount in sorted(value.items()):
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            raise HintError(f"{field}.{arm}", "must be a number")
        if not -MAX_BIAS <= amount <= MAX_BIAS:  # also false for infinities
            raise HintError(f"{field}.{arm}", f"must lie between {-MAX_BIAS:g} and {MAX_BIAS:g}")
        pairs.append((arm, float(amount)))
    return tuple(pairs)


def _utf8(field: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise HintError(field, "holds a lone surrogate, which is not text") from None


def _check_carrier(params: dict[object, object]) -> None:
    """Every value a scalar, a list of scalars or an object of scalars, within the carrier's bounds."""
    values, chars = _MAX_CARRIER_VALUES, _MAX_CARRIER_CHARS
    for key, value in params.items():
        if not isinstance(key, str):
            raise HintError("custom_params", "has a name that is not a string")
        if key in (CARRIED_PREDICTION, CARRIED_FORCED):
            continue  # They have bounds of their own.
        if key == TOOLS_KEY and isinstance(value, str) and value.isascii() and len(value) <= MAX_TOOLS_CHARS:
            continue
        values -= len(value) if isinstance(value, dict | list) else 1
        if values < 0:
            raise _carrier_error(key, f"makes custom_params hold more than {_MAX_CARRIER_VALUES} values")
        for scalar in (key, *_scalars(key, value)):
            if isinstance(scalar, str):
                chars -= len(scalar)
                _check_text(key, scalar, chars)
            elif scalar is not None and not isinstance(scalar, float):
                _check_integer(key, scalar)


def _carrier_error(key: str, reason: str) -> HintError:
    return HintError(f"custom_params.{ascii(key[:32])[1:-1]}", reason)


def _scalars(key: str, value: object) -> Iterable[object]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return (value,)
    if not all(isinstance(name, str) for name in value):
        raise _carrier_error(key, "has a name that is not a string")
    return (*value, *value.values())


def _check_text(key: str, text: str, chars_left: int) -> None:
    if chars_left < 0:
        raise _carrier_error(
            key, f"makes custom_params hold more than {_MAX_CARRIER_CHARS} characters of text"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _carrier_error(key, "holds a lone surrogate, which is not text") from None


def _check_integer(key: str, value: object) -> None:
    if not isinstance(value, int):
        raise _carrier_error(key, "nests deeper than a list or an object of scalars")
    if not -(2**63) <= value < 2**64:
        raise _carrier_error(key, "holds an integer of more than 64 bits")

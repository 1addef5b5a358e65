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
from typing import Any, Final, Literal, NamedTuple, NoReturn, TypeVar, get_args

Word = TypeVar("Word", bound=str)


class HintError(ValueError):
    """A hint that cannot be used: `field` is its path in the payload, `reason` says what to change."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def refuse_unknown(field: str, raw: Iterable[str], known: frozenset[str]) -> None:
    """Raise for the first name that is not `known`."""
    for name in raw:
        if name not in known:
            raise HintError(f"{field}.{printable(name)}", f"is unknown; known are {', '.join(sorted(known))}")


def flag(field: str, value: object) -> bool:
    """A boolean."""
    if not isinstance(value, bool):
        raise HintError(field, "must be true or false")
    return value


def choice(field: str, value: object, allowed: tuple[Word, ...]) -> Word | None:
    """One of the words `allowed`; None: not given."""
    if value is None:
        return None
    for word in allowed:
        if value == word:
            return word
    raise HintError(field, f"must be one of {', '.join(allowed)}")


def short_text(field: str, value: object, most: int) -> str | None:
    """A text of 1 to `most` characters; None: not given."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise HintError(field, "must be a string")
    if not value:
        raise HintError(field, "is empty; leave it out instead")
    if len(value) > most:
        raise HintError(field, f"is {len(value)} characters long; at most {most} are allowed")
    utf8(field, value)
    return value


def short_list(field: str, value: object, what: str, most: int) -> list[object]:
    """A list of at most `most`; what: its entries are, in an error."""
    if not isinstance(value, list):
        raise HintError(field, "must be a list")
    if len(value) > most:
        raise HintError(field, f"holds {len(value)} {what}; at most {most} are allowed")
    return value


def utf8(field: str, text: str) -> bytes:
    """The text's bytes."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise HintError(field, "holds a lone surrogate, which is not text") from None


def json_of(text: str) -> Any:
    """`json.loads`, but a lone surrogate is refused: no tokenizer takes one.

    Raises: ValueError, RecursionError.
    """
    value = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def printable(name: str) -> str:
    """A name that may be anything, as it may stand in an error."""
    return ascii(name[:32])[1:-1]


WIRE_KEY: Final = "whiflash"
TOOLS_KEY: Final = "whiflash_tools"
"""What the HTTP process tells the scheduler of a request's tools (`structure.tools`)."""
INFERRED_KEY: Final = "whiflash_inferred"
"""True where the spans are a guess of the HTTP process or of the SDK, and not the caller's. It only counts."""
_FIELD: Final = f"custom_params.{WIRE_KEY}"
WIRE_VERSION: Final = 1
CARRIED_PREDICTION: Final = "whiflash_prediction"
"""Beside our own key, since it may be long: what the caller expects back (`spans.prediction`)."""
CARRIED_FORCED: Final = "whiflash_forced"
"""The same for an answer that a benchmark forces (`spans.forced`)."""

KINDS: Final = ("tool_call", "json", "code", "reasoning", "prose")
ARMS: Final = ("ar", "diffusion", "lookup", "structure", "none")

TraceLevel = Literal["summary", "full"]
TRACE_LEVELS: Final[tuple[TraceLevel, ...]] = ("summary", "full")

HintSource = Literal["request", "inferred", "none", "malformed"]
"""Who said how a request is to be drafted."""
HINT_SOURCES: Final[tuple[HintSource, ...]] = get_args(HintSource)

LookupScope = Literal["memory", "context", "off"]
LOOKUP_SCOPES: Final[tuple[LookupScope, ...]] = ("memory", "context", "off")

MAX_TOOLS_CHARS: Final = 1 << 16
"""Longer lists of tools are told to nobody."""

MAX_SPANS: Final = 16
MAX_MARKER_CHARS: Final = 64
MAX_NAME_CHARS: Final = 64
"""Of an agent's name and a query's."""
MAX_QUERY: Final = 1 << 31
MAX_BLOCKS: Final = 16
MAX_BYTES: Final = 8192
MAX_BIAS: Final = 16.0  # expected accepted tokens; hardly any round accepts more

# The request, its spans and their biases: a well-formed payload holds no more objects than this.
_MAX_OBJECTS: Final = 1 + 2 * MAX_SPANS

SCOPES: Final = ("agent", "query", "structure")
"""Hints that say where in an agent's work a text belongs."""

_REQUEST_FIELDS: Final = frozenset({"version", "off", "infer", "trace", "lookup", "spans", *SCOPES})
_SPAN_FIELDS: Final = frozenset({"kind", "begin", "end", "open", "prefer", "pin", "bias"})

Bias = tuple[tuple[str, float], ...]


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


class Block(NamedTuple):
    """A stretch that an agent's answers are made of, by its literal markers. end: None if it never closes."""

    begin: str
    end: str | None


@dataclass(frozen=True, slots=True)
class RequestHints:
    """What one request says about its own routing. Hashable: requests with equal hints compare equal.

    spans: at most `MAX_SPANS`; among spans that open at the same byte the first listed is active.
    off: decode this request without drafting.
    infer: where `spans` is empty, let the server infer them from the request and its parsers.
    trace: return the routing trace with the response, in sums or with its stretches.
    lookup: what may be copied: `memory` (its own context, and its tenant's recent outputs where the server keeps
        them), `context` (its own context; nothing of it is kept either), `off`.
    agent, query: who asks, and which of its prompts this is: texts of one agent are copied from first.
    structure: blocks of its answers, at most `MAX_BLOCKS`; text of one block is copied into the same block first.
    tools, inferred: what the HTTP process says of the request's tools, and whether `spans` are its guess; no hints of
        the caller's, never part of the payload.
    """

    spans: tuple[SpanHint, ...] = ()
    off: bool = False
    infer: bool = True
    trace: TraceLevel | None = None
    lookup: LookupScope = "memory"
    agent: str | None = None
    query: str | None = None
    structure: tuple[Block, ...] = ()
    tools: str = ""
    inferred: bool = False

    @property
    def source(self) -> HintSource:
        """Who said how the request is to be drafted: the caller, where anything is the caller's own."""
        if self.off or self.lookup != "memory" or (self.spans and not self.inferred):
            return "request"
        return "inferred" if self.spans else "none"


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
    hints = replace(hints, tools=tools) if isinstance(tools, str) else hints
    return replace(hints, inferred=True) if INFERRED_KEY in custom_params else hints


def read_scope(field: str, raw: dict[str, object], names: tuple[str, str, str] = SCOPES) -> RequestHints:
    """Agent, query and structure alone, of an object that may have them under other `names`.

    Raises: HintError, and nothing else, naming the field that is wrong.
    """
    agent, query, structure = (f"{field}{name}" for name in names)
    values = [raw.get(name) for name in names]
    return RequestHints(
        agent=short_text(agent, values[0], MAX_NAME_CHARS),
        query=_query(query, values[1]),
        structure=_structure(structure, values[2]),
    )


def _decode(payload: object) -> dict[str, object]:
    if not isinstance(payload, str):
        raise HintError(
            _FIELD, "must be a string holding a JSON object (custom_params nests two levels only)"
        )
    if len(payload) > MAX_BYTES or (not payload.isascii() and len(utf8(_FIELD, payload)) > MAX_BYTES):
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
    refuse_unknown(_FIELD, raw, _REQUEST_FIELDS)
    version = raw.get("version", WIRE_VERSION)
    if type(version) is not int or version != WIRE_VERSION:
        raise HintError(f"{_FIELD}.version", f"this server understands version {WIRE_VERSION}")
    spans = short_list(f"{_FIELD}.spans", raw.get("spans", []), "spans", MAX_SPANS)
    return replace(
        read_scope(f"{_FIELD}.", raw),
        spans=tuple(_span(f"{_FIELD}.spans[{i}]", span) for i, span in enumerate(spans)),
        off=flag(f"{_FIELD}.off", raw.get("off", False)),
        infer=flag(f"{_FIELD}.infer", raw.get("infer", True)),
        trace=_trace_level(raw.get("trace", False)),
        lookup=choice(f"{_FIELD}.lookup", raw.get("lookup"), LOOKUP_SCOPES) or "memory",
    )


def _span(field: str, raw: object) -> SpanHint:
    if not isinstance(raw, dict):
        raise HintError(field, "must be an object")
    refuse_unknown(field, raw, _SPAN_FIELDS)
    kind = choice(f"{field}.kind", raw.get("kind"), KINDS)
    if kind is None:
        raise HintError(f"{field}.kind", f"is missing; give one of {', '.join(KINDS)}")
    span = SpanHint(
        kind=kind,
        begin=short_text(f"{field}.begin", raw.get("begin"), MAX_MARKER_CHARS),
        end=short_text(f"{field}.end", raw.get("end"), MAX_MARKER_CHARS),
        open=flag(f"{field}.open", raw.get("open", False)),
        prefer=choice(f"{field}.prefer", raw.get("prefer"), ARMS),
        pin=flag(f"{field}.pin", raw.get("pin", False)),
        bias=_bias(f"{field}.bias", raw.get("bias")),
    )
    if span.begin is None and not span.open:
        raise HintError(f"{field}.begin", "is missing; give a marker, or set open to start inside the span")
    if span.pin and span.prefer is None:
        raise HintError(f"{field}.prefer", "is missing; pin needs the arm to use")
    return span


def _query(field: str, value: object) -> str | None:
    """A name, or a number, which is as good as one."""
    if type(value) is int:
        if not 0 <= value < MAX_QUERY:
            raise HintError(field, f"must be at least 0 and below {MAX_QUERY}")
        return str(value)
    if value is not None and not isinstance(value, str):
        raise HintError(field, "must be a string or a whole number")
    return short_text(field, value, MAX_NAME_CHARS)


def _structure(field: str, value: object) -> tuple[Block, ...]:
    blocks = [] if value is None else short_list(field, value, "blocks", MAX_BLOCKS)
    return tuple(_block(f"{field}[{i}]", block) for i, block in enumerate(blocks))


def _block(field: str, raw: object) -> Block:
    if not isinstance(raw, list) or len(raw) != 2:
        raise HintError(field, "must be a list of two: the begin marker, and the end marker or null")
    begin, end = (short_text(f"{field}[{i}]", marker, MAX_MARKER_CHARS) for i, marker in enumerate(raw))
    if begin is None:
        raise HintError(f"{field}[0]", "must be a string")
    return Block(begin, end)


def _trace_level(value: object) -> TraceLevel | None:
    if isinstance(value, bool):
        return "summary" if value else None
    for level in TRACE_LEVELS:
        if value == level:
            return level
    raise HintError(f"{_FIELD}.trace", f"must be true, false, {' or '.join(TRACE_LEVELS)}")


def _bias(field: str, value: object) -> Bias:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise HintError(field, "must be an object of arms and numbers")
    refuse_unknown(field, value, frozenset(ARMS))
    pairs = []
    for arm, amount in sorted(value.items()):
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            raise HintError(f"{field}.{arm}", "must be a number")
        if not -MAX_BIAS <= amount <= MAX_BIAS:  # also false for infinities
            raise HintError(f"{field}.{arm}", f"must lie between {-MAX_BIAS:g} and {MAX_BIAS:g}")
        pairs.append((arm, float(amount)))
    return tuple(pairs)

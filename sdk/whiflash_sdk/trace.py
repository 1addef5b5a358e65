"""Routing traces: which drafter drafted which tokens, why, and the estimated time saved.

The server puts it into the response as `sglext.whiflash` (OpenAI routes) or `meta_info.whiflash`
(native route); the schema is documented in `docs/reference/traces.md`. Positions are output token offsets,
half-open. Token 0 comes from the prefill: it belongs to no round, so to no stretch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from whiflash_sdk.errors import TraceError
from whiflash_sdk.reading import text_or_none

Offset = Annotated[int, Field(ge=0)]

CALL: Final = "whiflash_call"
"""Key of an HTTP response's extensions under which the SDK stores the call."""
STREAMS: Final[dict[str, Any]] = {}
"""Newest calls whose answer is a stream, by the response's id: for final answers that outlive their stream."""
MOST_STREAMS: Final = 256


def keep_stream(response_id: str, call: Any) -> None:
    """Store a call, so that the traces of its final answer can be found; above `MOST_STREAMS` the oldest goes."""
    STREAMS[response_id] = call
    for oldest in list(STREAMS)[:-MOST_STREAMS]:  # a copy, since other threads add calls meanwhile
        STREAMS.pop(oldest, None)


class Rounds(BaseModel):
    """Base of what counts `rounds` and their `tokens`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @property
    def acceptance_length(self) -> float:
        """Return the tokens per round, bonus tokens included; 0 without rounds."""
        counts: Any = self
        return float(counts.tokens / counts.rounds) if counts.rounds else 0.0


class Stretch(Rounds):
    """Consecutive rounds of one drafter, chosen for one reason, in one span.

    start, end: output token offsets.
    arm: the drafter; `none` is plain decoding.
    rounds: verification passes of the target.
    proposed: draft tokens. accepted: accepted draft tokens, without bonus tokens.
    reason: routing reason.
    span: kind of the open span.
    chars: offsets of these tokens in `Trace.text`, half-open.
    round_tokens: tokens committed by each round, bonus tokens counted.
    round_proposed: draft tokens of each round.
    round_chars: characters of each round's accepted drafts and of its bonus token, which the target wrote.
    """

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    arm: str
    rounds: int = Field(ge=0)
    proposed: int | None = Field(default=None, ge=0)
    accepted: int = Field(ge=0)
    reason: str = ""
    span: str | None = None
    chars: tuple[Offset, Offset] | None = None
    round_tokens: tuple[int, ...] | None = None
    round_proposed: tuple[int, ...] | None = None
    round_chars: tuple[tuple[Offset, Offset], ...] | None = None

    @property
    def tokens(self) -> int:
        """Number of output tokens of the stretch."""
        return self.end - self.start


class ArmTotals(Rounds):
    """One drafter's share of a response.

    rounds: verification passes of the target.
    tokens: committed by them, bonus tokens counted.
    proposed: draft tokens. accepted: accepted draft tokens.
    saved: estimate of the seconds saved over plain decoding; below 0 if drafting cost time.
    """

    rounds: int = Field(ge=0)
    tokens: int = Field(ge=0)
    proposed: int | None = Field(default=None, ge=0)
    accepted: int | None = Field(default=None, ge=0)
    saved: float | None = Field(default=None, allow_inf_nan=False)

    @classmethod
    def sum(cls, totals: Iterable[ArmTotals]) -> ArmTotals:
        """Add totals up. Drafts are summed only if all totals have them."""
        rows = list(totals)
        is_told = all(row.proposed is not None and row.accepted is not None for row in rows)
        names = ("rounds", "tokens", "proposed", "accepted") if is_told else ("rounds", "tokens")
        sums = {name: sum(getattr(row, name) for row in rows) for name in names}
        return cls(**sums, saved=sum_known(row.saved for row in rows))


def sum_known(values: Iterable[float | None]) -> float | None:
    """Sum the values that are not None; None if all are."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) if numbers else None


class SourceTotals(BaseModel):
    """Drafts that were taken from one source, in rounds of any drafter.

    proposed: draft tokens. accepted: accepted draft tokens. saved: estimate of the seconds saved. A round's seconds are
    divided in proportion to accepted drafts.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    proposed: int = Field(ge=0)
    accepted: int = Field(ge=0)
    saved: float | None = Field(default=None, allow_inf_nan=False)


class Trace(Rounds):
    """The routing of one choice of one response.

    version: of the schema, 1.
    policy: the routing policy in force.
    stretches: in output order; none in a summary.
    rounds: verification passes of the target.
    tokens: committed by rounds, bonus tokens counted.
    switches: changes of drafter from one round to the next.
    arms: rounds, tokens, drafts and estimated seconds saved, by drafter.
    reasons: rounds by routing reason.
    sources: drafts and their share of the seconds saved, by source.
    cached: prompt tokens whose KV was kept, by place: `device`, `host` or `storage`.
    choice: index of the choice.
    text: the text that `chars` count in, if a parser took something out of the response's.
    seconds: from the request's first token to its last.
    gain: estimate of the rounds' speed over plain decoding.
    notes: parts of the request that the server did not follow, with reasons.
    """

    version: int
    policy: str
    stretches: tuple[Stretch, ...] = ()
    rounds: int = Field(ge=0)
    tokens: int = Field(ge=0)
    switches: int = Field(default=0, ge=0)
    arms: dict[str, ArmTotals] = Field(default_factory=dict)
    reasons: dict[str, int] = Field(default_factory=dict)
    sources: dict[str, SourceTotals] = Field(default_factory=dict)
    cached: dict[str, int] = Field(default_factory=dict)
    choice: int = Field(default=0, ge=0)
    text: str | None = None
    seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    gain: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float | None:
        """Return the request's speed without its prefill, in tokens a second; None if the server sends no seconds."""
        return self.tokens / self.seconds if self.seconds else None

    def __str__(self) -> str:
        """Return the figures in a few lines, for `print`; `repr` has all fields, `whiflash_sdk.render` the text."""
        from whiflash_sdk.render.text import figures  # here, since it imports this module

        return figures(self)


class CollectedTrace(Trace):
    """A trace of a `collect` block, with the call that it is of.

    response_id, model: as the response says them.
    agent: the name that went out with the request.
    started, ended: when the request began and its answer was complete, in UTC by this machine's clock.
    tools: names of the tools that the answer calls, in their order.
    """

    response_id: str | None
    model: str | None
    agent: str | None
    started: datetime
    ended: datetime
    tools: tuple[str, ...] = ()


def routing(response: object, choice: int = 0) -> Trace | None:
    """Return the routing trace of a response; None if it has none.

    response: a chat or text completion or a response of the Responses API, parsed or raw, a stream of a wrapped
        client once it has ended, a stream's chunk or event, or the JSON of any of them; of the native route, an item
        or a list of them.
    choice: index of the choice, for requests with `n` above 1, or of the item in a list; an item alone has one trace.

    Raises:
        TraceError: there is a trace that does not follow the schema.
        TypeError: the response has to be awaited first.
    """
    traces = map(parse_trace, raw_traces(response))
    is_item = field_of(response, "meta_info") is not None
    return next((trace for trace in traces if is_item or trace.choice == choice), None)


def parse_trace(raw: object) -> Trace:
    """Parse one trace as the server sent it. Raises: TraceError if it does not follow the schema."""
    try:
        trace = Trace.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise TraceError(f"trace.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if trace.version != 1:
        raise TraceError(f"trace.version: this SDK reads version 1, not {trace.version}; update whiflash-sdk")
    return trace


def raw_traces(response: Any) -> list[Any]:
    """Return a response's traces, one for each choice, unparsed; full ones with the text that their offsets index."""
    if isinstance(response, list):
        return [raw for item in response for raw in raw_traces(item)]
    if not isinstance(response, Mapping | BaseModel):
        # An event stream of the client holds a raw stream, and streams and raw responses hold their HTTP response.
        holder = getattr(response, "_raw_stream", response)
        answer = getattr(holder, "http_response", None) or getattr(holder, "response", None)
        call = getattr(answer, "extensions", {}).get(CALL)
        if call is not None:
            return list(call.raw_traces)
        if hasattr(response, "parse"):
            response = response.parse()  # a raw response
            if inspect.iscoroutine(response):
                response.close()
                raise TypeError("routing takes what `await response.parse()` gives, not the response itself")
    texts = texts_of(response)
    sent = [with_text(raw, texts) for raw in sent_traces(response)]
    whole = field_of(response, "object") == "chat.completion" or field_of(response, "type") == "message"
    if whole and not sent:
        # `stream.get_final_completion()` builds a response from chunks, so the trace is stored with the stream's call.
        call = STREAMS.get(field_of(response, "id"))
        return [] if call is None else list(call.raw_traces)
    return sent


def answer_in(body: Any) -> Any:
    """Return the response object inside an event of Responses or Messages; other bodies are returned as they are."""
    return field_of(body, "response") or field_of(body, "message") or body


def sent_traces(body: Any) -> list[Any]:
    """Return the traces in the body of a response, a chunk or an event, as they were sent."""
    # The last event of a Responses stream holds the response.
    for holder in (body, field_of(body, "response")):
        fields = holder if isinstance(holder, Mapping) else getattr(holder, "model_extra", None) or {}
        for name in ("sglext", "meta_info"):
            extension = fields.get(name)
            traces = extension.get("whiflash") if isinstance(extension, Mapping) else None
            if traces is not None:
                return traces if isinstance(traces, list) else [traces]
    return []


def with_text(raw: Any, texts: Mapping[int | None, str]) -> Any:
    """Add to a full trace the text that its offsets index; the server leaves it out if the response contains it."""
    if not isinstance(raw, dict) or raw.get("text") is not None or not _has_offsets(raw.get("stretches")):
        return raw
    text = texts.get(raw.get("choice", 0), texts.get(None))
    return raw if text is None else {**raw, "text": text}


def _has_offsets(stretches: Any) -> bool:
    first = stretches[0] if isinstance(stretches, list) and stretches else None
    return isinstance(first, dict) and first.get("chars") is not None


def text_of(choice: Any) -> str:
    """Return the text of one choice of a response or chunk, which may be an object or JSON."""
    holder = field_of(choice, "message") or field_of(choice, "delta") or choice
    return text_or_none(field_of(holder, "content") or field_of(choice, "text")) or ""


def tools_called(response: Any) -> dict[int, tuple[str, ...]]:
    """Return the names of the tools that a response, a chunk or an event calls, by choice; a stream names each once.

    The event that ends a response of the Responses API holds all calls; Messages begin a block for each call.
    """
    names_by_choice = {}
    for choice in field_of(response, "choices") or ():
        holder = field_of(choice, "message") or field_of(choice, "delta")
        names = [field_of(field_of(one, "function"), "name") for one in field_of(holder, "tool_calls") or ()]
        names_by_choice[field_of(choice, "index") or 0] = tuple(name for name in names if name)
    blocks = field_of(answer_in(response), "output") or field_of(response, "content")
    block = field_of(response, "content_block")
    for called in blocks if isinstance(blocks, list) else [block]:
        if field_of(called, "type") in ("function_call", "tool_use") and (name := field_of(called, "name")):
            names_by_choice[0] = (*names_by_choice.get(0, ()), name)
    return {index: names for index, names in names_by_choice.items() if names}


def texts_of(response: Any) -> dict[int | None, str]:
    """Return the text in a response or a chunk by choice; of an item of the native route under the key None."""
    if isinstance(response, Mapping) and isinstance(response.get("text"), str):
        return {None: response["text"]}
    return {field_of(choice, "index") or 0: text_of(choice) for choice in field_of(response, "choices") or ()}


def field_of(holder: Any, name: str) -> Any:
    """Return a field of an object or of a JSON object; None if it has no such field."""
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)

"""Add traces, counts of predicted tokens and vLLM's acceptance figures to the answers that routes send.

OpenAI's chat and text completions carry traces in SGLang's extension `sglext`, which a stream sends as a last chunk of
its own, and counts of predicted tokens in their usage. Responses and Messages have no field for either, so both go into
`sglext`: of the answer, of the `response` in a stream's last event, or of the event `message_delta`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.entrypoints.openai.protocol import ResponsesResponse
from starlette.types import Message, Send

from whiflash_sglang.engine.carried import META_KEY
from whiflash_sglang.engine.patching import around
from whiflash_sglang.engine.scheduler import figures
from whiflash_sglang.http.reader import CURRENT, Call

Change = Callable[[dict[str, Any]], dict[str, Any]]
"""Returns a JSON object with additions; the same object if there is nothing to add."""

EXTENSION, PREDICTION = "sglext", "prediction"
_DETAILS = "completion_tokens_details"
_ENDS = {"message": None, "message_delta": None} | dict.fromkeys(
    ("response.completed", "response.incomplete", "response.failed"), "response"
)
"""Field that gets the extension, by the type of a Messages answer or of a stream's last event; None: itself."""


def extending(call: Call, send: Send) -> Send:
    """Return a `send` that adds traces and counts to an answer; SGLang's own `send` if this call asked for none."""
    if (call.fields is None or call.fields.params is None) and not call.body.get("return_spec_tokens_details"):
        return send
    return _Sent(send, lambda answer: extended(call, answer), _Events(call)).send


def joining(call: Call, send: Send) -> Send:
    """Return a `send` that keeps events while `call.holds`, until `call.flush` sends them as one message."""
    held: list[bytes] = []

    async def joined(message: Message) -> None:
        held.append(message.get("body", b""))
        if not (call.holds and message.get("more_body")):
            body = b"".join(held)
            held.clear()
            await send({**message, "body": body} if body else message)

    async def flush() -> None:
        call.holds = False
        if held:
            await joined({"type": "http.response.body", "more_body": True})

    call.flush = flush
    return joined


def rewriting(send: Send, change: Change) -> Send:
    """Return a `send` that passes an answer in JSON through `change`."""
    return _Sent(send, change, None).send


class _Sent:
    """Changes an answer before it is sent: JSON as a whole, a stream event by event if `events` is given."""

    def __init__(self, send: Send, change: Change, events: "_Events | None") -> None:
        self._send, self._change, self._events = send, change, events
        self._start: Message | None = None
        """Start message of an answer in JSON. It waits for the changed body, whose length it carries."""
        self._body = b""

    async def send(self, message: Message) -> None:
        is_body, ends = message["type"] == "http.response.body", not message.get("more_body", False)
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif is_body and self._start is not None:
            self._body += message.get("body", b"")
            if ends:
                await self._send_whole(self._start)
        elif is_body and self._events is not None:
            body = self._events.take(message.get("body", b""), ends=ends)
            if body or ends:
                await self._send({**message, "body": body})
        else:
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        kind = dict(message.get("headers", ())).get(b"content-type", b"") if message["status"] == 200 else b""
        if not kind.startswith(b"text/event-stream"):
            self._events = None
        if kind.startswith(b"application/json"):
            self._start = message
        else:
            await self._send(message)

    async def _send_whole(self, start: Message) -> None:
        answer = json.loads(self._body)  # noqa: TID251  (this server wrote it)
        changed = self._change(answer) if isinstance(answer, dict) else answer
        body = self._body if changed is answer else _json(changed).encode()
        headers = [pair for pair in start.get("headers", ()) if pair[0] != b"content-length"]
        await self._send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})


def extended(call: Call, answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer in JSON, or an event of a stream of Responses or Messages, with the call's traces and counts."""
    if call.form in ("responses", "messages"):
        extension = extension_of(call) if answer.get("type") in _ENDS else {}
        if not extension:
            return answer
        field = _ENDS[answer["type"]]
        part = {**(answer if field is None else answer[field]), EXTENSION: extension}
        return part if field is None else {**answer, field: part}
    answer = _with_figures(call, answer)
    if call.traces and "choices" in answer:
        texts = {c["index"]: (c["message"]["content"] if "message" in c else c["text"]) for c in answer["choices"]}
        answer = {**answer, EXTENSION: {**(answer.get(EXTENSION) or {}), META_KEY: _traces(call, texts)}}
    return answer


def extension_of(call: Call) -> dict[str, Any]:
    """Return the traces and counts for the field `EXTENSION` of Responses or Messages; empty if not asked for."""
    extension: dict[str, Any] = {META_KEY: _traces(call, {})} if call.traces else {}
    return {**extension, PREDICTION: _counts(call)} if call.counts else extension


def _counts(call: Call) -> dict[str, int]:
    """Return the numbers of accepted and rejected prediction tokens, over all choices of a request."""
    return {name: sum(counts[name] for counts in call.counts.values()) for name in next(iter(call.counts.values()), {})}


def _traces(call: Call, texts: Mapping[int, str | None]) -> Any:
    """Return the call's trace, or a list of its choices' traces. texts: by choice, as the client sees them.

    A full trace carries the text that its offsets refer to only if its client sees another one.
    """
    traces = []
    for trace, text in sorted(call.traces, key=lambda entry: int(entry[0]["choice"])):
        if "stretches" in trace and text is not None:
            if text != (texts.get(trace["choice"]) or ""):
                trace.setdefault("text", text)
            elif trace.get("text") == text:
                del trace["text"]
        traces.append(trace)
    return traces[0] if len(traces) == 1 else traces


def _with_figures(call: Call, answer: dict[str, Any], *, usage_too: bool = True) -> dict[str, Any]:
    """Return an OpenAI answer or chunk with counts of predicted tokens in its usage, and vLLM's `metrics`."""
    usage = answer.get("usage")
    if usage_too and usage and call.counts:
        details = usage.get(_DETAILS) or {"reasoning_tokens": usage.get("reasoning_tokens") or 0}
        answer = {**answer, "usage": {**usage, _DETAILS: {**details, **_counts(call)}}}
    acceptance = figures.acceptance_in(answer)
    return answer if acceptance is None else {**answer, figures.METRICS: acceptance}


class _Events:
    """Changes the server-sent events of one call's stream."""

    def __init__(self, call: Call) -> None:
        self._call, self._rest, self._last = call, b"", b""
        self._is_openai = call.form in ("chat", "completion")
        self._is_full = call.fields is not None and call.fields.hints.trace == "full"
        self._texts: dict[int, str] = {}
        """Text that the client has seen of each choice, if a full trace needs it."""

    def take(self, data: bytes, *, ends: bool) -> bytes:
        """Return the bytes to send after `data` has arrived: only whole events, since SGLang may cut them anywhere."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        change = self._openai if self._is_openai else self._converted
        sent = b"".join(change(event) + b"\n\n" for event in events)
        if ends:
            sent, self._rest = sent + self._rest, b""
        return sent

    def _openai(self, event: bytes) -> bytes:
        if event.startswith(b"data: [DONE]"):
            return (self._trace_chunk() + b"\n\n" if self._call.traces else b"") + event
        if not event.startswith(b"data: {"):
            return event
        self._last = event
        has_counts = self._call.counts and b'"usage":{' in event
        if not self._is_full and not has_counts and figures.DETAILS.encode() not in event:
            return event
        chunk = _data(event.removeprefix(b"data: "))
        for choice in chunk.get("choices") or () if self._is_full else ():
            text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            self._texts[choice["index"]] = self._texts.get(choice["index"], "") + text
        changed = _with_figures(self._call, chunk, usage_too=not chunk.get("choices"))
        return event if changed is chunk else b"data: " + _json(changed).encode()

    def _trace_chunk(self) -> bytes:
        """Return a last chunk with the traces. It has no choices, as SGLang's own extension chunks."""
        last = _data(self._last.removeprefix(b"data: ")) if self._last else {}
        chunk: dict[str, Any] = {
            "id": "whiflash-trace",
            "object": "chat.completion.chunk" if self._call.form == "chat" else "text_completion",
            "created": 0,
            "model": last.get("model") or self._call.body.get("model"),
            "choices": [],
            EXTENSION: {META_KEY: _traces(self._call, self._texts)},
        }
        return f"data: {json.dumps(chunk)}".encode()

    def _converted(self, event: bytes) -> bytes:
        name, mark, text = event.partition(b"\ndata: ")
        if not mark or not (self._call.traces or self._call.counts):
            return event
        data = _data(text)
        changed = extended(self._call, data)
        return event if changed is data else name + mark + _json(changed).encode()


def _data(text: bytes) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(text)  # noqa: TID251  (this server wrote it)
    return data


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@around(
    "sglang.srt.entrypoints.openai.serving_responses:OpenAIServingResponses.responses_full_generator",
    params=("request", "sampling_params", "result_generator"),
    why="SGLang keeps answers of Responses and returns them again, also those that ran in the background",
    until="SGLang carries `meta_info` of algorithms over",
    optional=True,
)
async def _full_response(original: Any, self: Any, *args: Any, **named: Any) -> Any:
    """Add traces and counts of predicted tokens to answers of Responses."""
    response = await original(self, *args, **named)
    call = CURRENT.get()
    extension = extension_of(call) if call is not None else {}
    if extension and isinstance(response, ResponsesResponse):
        setattr(response, EXTENSION, extension)
    return response


def allow_extensions() -> None:
    """Let answers of Responses carry a field of ours. Idempotent."""
    if ResponsesResponse.model_config.get("extra") != "allow":
        ResponsesResponse.model_config["extra"] = "allow"
        ResponsesResponse.model_rebuild(force=True)

"""Traces, and what of predictions appeared, in answers that SGLang converts: OpenAI's Responses, Anthropic's Messages.

Neither has a place for them, and the usage of both is closed, so both go into `sglext`, as chat completions have it: of
an answer, of the `response` in a stream's last event, or of the event `message_delta`. Answers to who asked for neither
are SGLang's own. In the process that serves HTTP.
"""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.openai.protocol import ResponsesResponse

from whiflash_sglang.compat.carried import META_KEY
from whiflash_sglang.compat.http import predictions, traces
from whiflash_sglang.compat.http.converted import serving_of_responses
from whiflash_sglang.compat.patching import allow_extra, around, replace

EXTENSION = "sglext"
PREDICTION = "prediction"

_ENDED = ("response.completed", "response.incomplete", "response.failed")
"""Types of a Responses stream's last event."""


def install() -> None:
    """Idempotent."""
    allow_extra(AnthropicMessagesResponse, ResponsesResponse)
    replace(AnthropicServing, "_convert_response", _with_extension)
    replace(AnthropicServing, "_generate_anthropic_stream", _extending_messages)
    serving = serving_of_responses()
    if serving is None:
        return
    replace(serving, "_generate_with_builtin_tools", _naming_request)
    replace(serving, "responses_full_generator", _extending_response)
    for stream in ("responses_stream_generator", "responses_stream_generator_non_harmony"):
        replace(serving, stream, _extending_responses)


def extension_of(obj: Any) -> dict[str, Any]:
    """The extension of an answer to an internal request; empty if its request asked for nothing."""
    found: dict[str, Any] = {}
    told = traces.completed_of(obj)
    if told:
        found[META_KEY] = told[0] if len(told) == 1 else told
    counts = predictions.counts_of(obj)
    return {**found, PREDICTION: counts} if counts else found


@around
def _with_extension(original: Any, self: Any, response: Any) -> Any:
    converted = original(self, response)
    found: dict[str, Any] = {}
    trace = getattr(response.sglext, META_KEY, None)
    if trace is not None:
        shown = response.choices[0].message.content or ""
        found[META_KEY] = {"text": shown, **trace} if "stretches" in trace else trace
    details = getattr(response.usage, "completion_tokens_details", None)
    counts = predictions.counts_in(details)
    if counts:
        found[PREDICTION] = counts
    if found:
        setattr(converted, EXTENSION, found)
    return converted


@around
async def _extending_messages(
    original: Any, self: Any, adapted: Any, *rest: Any, **named: Any
) -> AsyncIterator[str]:
    async for event in original(self, adapted, *rest, **named):
        yield _extended(event, adapted, lambda data: data if data["type"] == "message_delta" else None)


class _Named:
    """The outputs of a request, which say whose they are."""

    def __init__(self, outputs: AsyncIterator[Any], obj: Any) -> None:
        self._outputs, self.obj = outputs, obj

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._outputs


@around
def _naming_request(
    original: Any, self: Any, request_id: Any, prompt: Any, adapted: Any, *rest: Any, **named: Any
) -> _Named:
    return _Named(original(self, request_id, prompt, adapted, *rest, **named), adapted)


@around
async def _extending_response(
    original: Any, self: Any, request: Any, sampling_params: Any, outputs: Any, *rest: Any, **named: Any
) -> Any:
    response = await original(self, request, sampling_params, outputs, *rest, **named)
    found = extension_of(getattr(outputs, "obj", None))
    if found and isinstance(response, ResponsesResponse):
        setattr(response, EXTENSION, found)
    return response


@around
async def _extending_responses(
    original: Any, self: Any, request: Any, sampling_params: Any, outputs: Any, *rest: Any, **named: Any
) -> AsyncIterator[str]:
    obj = getattr(outputs, "obj", None)
    async for event in original(self, request, sampling_params, outputs, *rest, **named):
        yield _extended(event, obj, lambda data: data["response"] if data["type"] in _ENDED else None)


def _extended(event: str, obj: Any, place: Callable[[dict[str, Any]], dict[str, Any] | None]) -> str:
    """An event of a stream; where it has a `place` for an extension, and there is one, with that in it."""
    name, mark, text = event.partition("\ndata: ")
    found = extension_of(obj) if mark else {}
    if not found:
        return event
    data = json.loads(text)  # noqa: TID251  (this server wrote it)
    holder = place(data)
    if holder is None:
        return event
    holder[EXTENSION] = found
    return f"{name}{mark}{json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

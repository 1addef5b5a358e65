"""Traces, and what of predictions appeared, in answers that SGLang converts: OpenAI's Responses, Anthropic's Messages.

Neither has a place for them, and the usage of both is closed, so both go into `sglext`, as chat completions have it: of
an answer, of the `response` in a stream's last event, or of the event `message_delta`. Answers to who asked for neither
are SGLang's own. In the process that serves HTTP.
"""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from sglang.srt.entrypoints.openai.protocol import ResponsesResponse

from whiflash_sglang.compat.carried import META_KEY
from whiflash_sglang.compat.http import predictions, traces
from whiflash_sglang.compat.patching import allow_extra, around

EXTENSION = "sglext"
PREDICTION = "prediction"


def allow_extensions() -> None:
    """Idempotent."""
    allow_extra(AnthropicMessagesResponse, ResponsesResponse)


_ENDED = ("response.completed", "response.incomplete", "response.failed")
"""Types of a Responses stream's last event."""


def extension_of(obj: Any) -> dict[str, Any]:
    """The extension of an answer to an internal request; empty if its request asked for nothing."""
    found: dict[str, Any] = {}
    told = traces.completed_of(obj)
    if told:
        found[META_KEY] = told[0] if len(told) == 1 else told
    counts = predictions.counts_of(obj)
    return {**found, PREDICTION: counts} if counts else found


@around(
    "sglang.srt.entrypoints.anthropic.serving:AnthropicServing._convert_response",
    params=("response",),
    why="Messages has no place for extensions",
    until="SGLang carries `sglext` over",
)
def _with_extension(original: Any, self: Any, response: Any) -> Any:
    """An answer to Messages has traces and what of predictions appeared."""
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


@around(
    "sglang.srt.entrypoints.anthropic.serving:AnthropicServing._generate_anthropic_stream",
    params=("adapted_request",),
    why="Messages has no place for extensions",
    until="SGLang carries `sglext` over",
)
async def _extending_messages(
    original: Any, self: Any, adapted: Any, *rest: Any, **named: Any
) -> AsyncIterator[str]:
    """The same of a stream of Messages."""
    async for event in original(self, adapted, *rest, **named):
        yield _extended(event, adapted, lambda data: data if data["type"] == "message_delta" else None)


class _Named:
    """The outputs of a request, which say whose they are."""

    def __init__(self, outputs: AsyncIterator[Any], obj: Any) -> None:
        self._outputs, self.obj = outputs, obj

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._outputs


@around(
    "sglang.srt.entrypoints.openai.serving_responses:OpenAIServingResponses._generate_with_builtin_tools",
    params=("request_id", "request_prompt", "adapted_request"),
    why="the writer of a Responses answer does not know its request",
    until="it does",
    optional=True,
)
def _naming_request(
    original: Any, self: Any, request_id: Any, prompt: Any, adapted: Any, *rest: Any, **named: Any
) -> _Named:
    """The outputs of a Responses request know their request."""
    return _Named(original(self, request_id, prompt, adapted, *rest, **named), adapted)


@around(
    "sglang.srt.entrypoints.openai.serving_responses:OpenAIServingResponses.responses_full_generator",
    params=("request", "sampling_params", "result_generator"),
    why="Responses has no place for extensions, and its store keeps answers",
    until="SGLang carries `sglext` over",
    optional=True,
)
async def _extending_response(
    original: Any, self: Any, request: Any, sampling_params: Any, outputs: Any, *rest: Any, **named: Any
) -> Any:
    """An answer of Responses has traces and what of predictions appeared."""
    response = await original(self, request, sampling_params, outputs, *rest, **named)
    found = extension_of(getattr(outputs, "obj", None))
    if found and isinstance(response, ResponsesResponse):
        setattr(response, EXTENSION, found)
    return response


@around(
    "sglang.srt.entrypoints.openai.serving_responses:OpenAIServingResponses.responses_stream_generator",
    "sglang.srt.entrypoints.openai.serving_responses:OpenAIServingResponses.responses_stream_generator_non_harmony",
    params=("request", "sampling_params", "result_generator"),
    why="Responses has no place for extensions",
    until="SGLang carries `sglext` over",
    optional=True,
)
async def _extending_responses(
    original: Any, self: Any, request: Any, sampling_params: Any, outputs: Any, *rest: Any, **named: Any
) -> AsyncIterator[str]:
    """The same of a stream of Responses."""
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

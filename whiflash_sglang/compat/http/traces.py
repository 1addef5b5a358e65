"""Traces in SGLang's HTTP process: completed with what only text shows, and put where clients look for them.

A trace arrives in the `meta_info` of its request's last output; the OpenAI routes show it as `sglext`.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

from sglang.srt.entrypoints.openai import protocol

from whiflash_sglang.compat.carried import META_KEY
from whiflash_sglang.compat.http import figures, predictions
from whiflash_sglang.compat.patching import allow_extra, around
from whiflash_sglang.spans.hints import HintError, parse_hints
from whiflash_sglang.spans.vocabulary import token_bytes
from whiflash_sglang.telemetry.trace import pieces_of, place

_RESPONSES = (
    "ChatCompletionResponse",
    "ChatCompletionStreamResponse",
    "CompletionResponse",
    "CompletionStreamResponse",
)
_FOUND = "_whiflash_traces"


def allow_extensions() -> None:
    """Idempotent."""
    # The responses are rebuilt since they embed the schema of `sglext`.
    allow_extra(protocol.SglExt, *(getattr(protocol, name) for name in _RESPONSES))


async def followed(manager: Any, obj: Any, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The outputs of a request, with its traces completed: the choice that each is of, and what only text shows."""
    arrived = _Arrived(manager, obj)
    async for output in outputs:
        for choice, item in predictions.choices_of(output):
            arrived.take(item, choice)
        yield output


def completed_of(obj: Any) -> list[dict[str, Any]]:
    """The traces of an internal request's choices that have ended, with the texts that those with offsets count in."""
    return [_with_text(trace, text, None) for trace, text in getattr(obj, _FOUND, None) or ()]


class _Arrived:
    """What has come of one request's answers. Streams of increments are put together for those that need the whole.

    The traces are left on `obj`, the one thing that reaches the writer of a stream, with the texts they count in.
    """

    def __init__(self, manager: Any, obj: Any) -> None:
        self._manager, self._obj = manager, obj
        increments = bool(getattr(obj, "stream", False)) and manager.incremental_streaming_output
        self._earlier: dict[int, tuple[list[int], list[str]]] | None = (
            {} if increments and asks_text(obj) else None
        )

    def take(self, item: dict[str, Any], choice: int) -> None:
        tokens, text = item.get("output_ids") or [], item.get("text")
        if self._earlier is not None:
            before = self._earlier.setdefault(choice, ([], []))
            before[0].extend(tokens)
            before[1].append(text or "")
        trace = item["meta_info"].get(META_KEY)
        if trace is None:
            return
        if self._earlier is not None:
            tokens, text = before[0], "".join(before[1])
        trace["choice"] = choice
        if notes := predictions.notes_of(self._obj, choice):
            trace["notes"] = notes
        is_whole = len(tokens) == item["meta_info"]["completion_tokens"]
        if "stretches" in trace and is_whole and self._manager.tokenizer is not None:
            place_text(self._manager, self._obj, choice, trace, tokens, text)
            if self._earlier is not None:
                trace.setdefault("text", text)  # the answer's last line holds its end alone
        self._obj.__dict__.setdefault(_FOUND, []).append((trace, text))


def place_text(
    manager: Any, obj: Any, choice: int, trace: dict[str, Any], tokens: list[int], text: str | None
) -> None:
    """Give the stretches of a full trace their places in the text of all its output `tokens`."""
    vocabulary, special = _vocabulary(manager)
    skipped = special if _skips_special_tokens(obj, choice) else frozenset[int]()
    place(trace, pieces_of(tokens, vocabulary, skipped), text)


def asks_text(obj: Any) -> bool:
    """Whether a full trace was asked for, which is the kind that speaks of text."""
    for parameters in predictions.parameters_of(obj):
        if isinstance(parameters, dict):
            try:
                if parse_hints(parameters.get("custom_params")).trace == "full":
                    return True
            except HintError:
                continue
    return False


def _skips_special_tokens(obj: Any, choice: int) -> bool:
    own = predictions.of_choice(predictions.parameters_of(obj), obj, choice)
    return bool(own.get("skip_special_tokens", True)) if isinstance(own, dict) else True


def _vocabulary(manager: Any) -> tuple[tuple[bytes, ...], frozenset[int]]:
    """Bytes of every token and the ids of special ones; built at the first full trace."""
    found: tuple[tuple[bytes, ...], frozenset[int]] | None = getattr(manager, "_whiflash_vocabulary", None)
    if found is None:
        found = manager._whiflash_vocabulary = token_bytes(manager.tokenizer), _special_ids(manager.tokenizer)
    return found


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """What decoding leaves out: every token added as special, not only those with a part to play (end, padding)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


@around(
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._build_chat_response",
    "sglang.srt.entrypoints.openai.serving_completions:OpenAIServingCompletion._build_completion_response",
    params=("request", "ret"),
    why="answers have no place for extensions",
    until="SGLang carries `meta_info` of algorithms into `sglext`",
)
def _with_trace(
    original: Any, self: Any, request: Any, ret: list[dict[str, Any]], *rest: Any, **named: Any
) -> Any:
    """Answers have traces, what of predictions appeared, and vLLM's figures of acceptance."""
    # Taken out first: with `return_meta_info` the response would carry it twice.
    traces = [item["meta_info"].pop(META_KEY, None) for item in ret]
    response = original(self, request, ret, *rest, **named)
    predictions.add_to_usage(response, ret)
    figures.add_acceptance(response)
    found = []
    for item, trace, choice in zip(ret, traces, getattr(response, "choices", ()), strict=False):
        if trace is not None:
            message = getattr(choice, "message", None)
            shown = choice.text if message is None else message.content
            found.append(_with_text(trace, item.get("text"), shown))
    if found:
        extension = response.sglext or protocol.SglExt()
        setattr(extension, META_KEY, found[0] if len(found) == 1 else found)
        response.sglext = extension
    return response


@around(
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._generate_chat_stream",
    "sglang.srt.entrypoints.openai.serving_completions:OpenAIServingCompletion._generate_completion_stream",
    params=("adapted_request", "request"),
    why="streams have no place for extensions",
    until="SGLang carries `meta_info` of algorithms into `sglext`",
)
async def _with_trace_chunk(
    original: Any, self: Any, adapted: Any, request: Any, *rest: Any, **named: Any
) -> AsyncIterator[str]:
    """The same of streams."""
    shown: dict[int, str] | None = {} if asks_text(adapted) else None
    async for line in original(self, adapted, request, *rest, **named):
        if shown is not None:
            _note_shown(shown, line)
        found = getattr(adapted, _FOUND, None)
        if found and line.startswith("data: [DONE]"):
            texts = shown or {}
            traces = [_with_text(trace, text, texts.get(trace["choice"])) for trace, text in found]
            yield f"data: {json.dumps(_trace_chunk(request, traces))}\n\n"
        yield figures.with_acceptance(predictions.with_usage(adapted, line))


def _with_text(trace: dict[str, Any], text: str | None, shown: str | None) -> dict[str, Any]:
    """The trace, with the text that its offsets count in where its client was shown another one, and only there."""
    if "stretches" in trace and text is not None:
        if text != (shown or ""):
            trace.setdefault("text", text)
        elif trace.get("text") == text:
            del trace["text"]
    return trace


def _note_shown(shown: dict[int, str], line: str) -> None:
    """What the lines of a stream have put into the content of each choice."""
    for part in line.split("\n"):
        if part.startswith("data: {"):
            chunk = json.loads(part.removeprefix("data: "))  # noqa: TID251  (this server wrote it)
            for choice in chunk.get("choices") or ():
                text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
                shown[choice["index"]] = shown.get(choice["index"], "") + text


def _trace_chunk(request: Any, traces: list[dict[str, Any]]) -> dict[str, Any]:
    """A last chunk without choices, as SGLang's own extension chunks are."""
    kind = "chat.completion.chunk" if hasattr(request, "messages") else "text_completion"
    return {
        "id": "whiflash-trace",
        "object": kind,
        "created": 0,
        "model": request.model,
        "choices": [],
        "sglext": {META_KEY: traces[0] if len(traces) == 1 else traces},
    }

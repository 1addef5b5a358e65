"""Add routing traces, and counts of right and wrong predicted tokens, to the outputs of requests, in the process that
serves HTTP or holds an `Engine`.

A scheduler sends the recording of a request with its last output. A trace is made of it when SGLang makes that output's
`meta_info`. The places of its stretches in the text are added when the output passes on its way to a route
(`followed`); `writer` puts the trace into the answer. Counts of predicted tokens compare only tokens, so they depend
neither on the drafters nor on the rest of the batch.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from whiflash_kernels.cpu.texts import compiled_texts

from whiflash_sglang.copying.texts import Prediction
from whiflash_sglang.embedded import cache_root
from whiflash_sglang.engine.carried import META_KEY
from whiflash_sglang.engine.patching import around
from whiflash_sglang.http.reader import Call, Fields, of_choice, parameters_of
from whiflash_sglang.http.token_texts import decoder_of
from whiflash_sglang.telemetry.trace import build_trace, place, span_attributes

_ATTRIBUTES = "_whiflash_attributes"


@around(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.update_request_meta_info",
    params=("meta_info", "state", "customized_info", "index", "finish_reason"),
    why="SGLang cuts records by token offsets and repeats them with every output",
    until="it has records of a whole request",
)
def _update_meta_info(
    original: Any, self: Any, meta_info: Any, state: Any, customized_info: Any, index: int, finish_reason: Any
) -> None:
    """Keep recordings out of the records that SGLang cuts by token offsets and repeats with every output."""
    others = {key: values for key, values in customized_info.items() if key != META_KEY}
    original(self, meta_info, state, others, index, finish_reason)
    for recording in customized_info[META_KEY][index] if META_KEY in customized_info else ():
        if recording.level is not None:
            meta_info[META_KEY] = build_trace(recording, recording.policy, meta_info["completion_tokens"])
        if recording.spanned:
            setattr(state, _ATTRIBUTES, span_attributes(recording, recording.policy, meta_info["completion_tokens"]))


@around(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.convert_to_span_attrs",
    params=("state",),
    why="algorithms cannot add to spans",
    until="they can",
)
def _span_attributes(original: Any, self: Any, state: Any, *args: Any) -> dict[str, Any]:
    """Add to a request's tracing span (`--enable-trace`) which drafters drafted it."""
    return {**original(self, state, *args), **getattr(state, _ATTRIBUTES, {})}


def followed(
    manager: Any, obj: Any, call: Call | None, fields: list[Fields], outputs: AsyncIterator[Any]
) -> AsyncIterator[Any]:
    """Return the outputs of a request; SGLang's own iterator if it asked for no trace and sent no prediction. A trace
    gets the index of its choice. It stays in a native request's output; for other calls `writer` sends it.
    """
    if all(one.hints.trace is None and one.prediction is None for one in fields):
        return outputs
    return _Outputs(manager, obj, call, fields).follow(outputs)


def _predicted(prediction: Sequence[int], answer: Sequence[int]) -> dict[str, int]:
    """Return OpenAI's counts of accepted and rejected prediction tokens; without a C++ compiler all are rejected."""
    try:
        followed = Prediction(compiled_texts(cache_root() / "compiled"), prediction)
    except OSError:
        accepted, rejected = 0, len(prediction)
    else:
        followed.follow(answer)
        accepted, rejected = followed.appeared
    return {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}


class _Outputs:
    """Completes the outputs of one request. The increments of a stream are joined first."""

    def __init__(self, manager: Any, obj: Any, call: Call | None, fields: list[Fields]) -> None:
        self._manager, self._obj, self._call, self._fields = manager, obj, call, fields
        self._has_increments = bool(getattr(obj, "stream", False)) and manager.incremental_streaming_output
        self._earlier: dict[int, tuple[list[int], list[str]]] = {}
        """Token ids and texts of each choice's increments so far."""

    async def follow(self, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for output in outputs:
            for number, item in enumerate(output if isinstance(output, list) else [output]):
                if isinstance(item, dict) and isinstance(item.get("meta_info"), dict):
                    await self._complete(item, item.get("index", number))
            yield output

    async def _complete(self, item: dict[str, Any], choice: int) -> None:
        fields, meta = of_choice(self._fields, self._obj, choice), item["meta_info"]
        tokens, text = item.get("output_ids") or [], item.get("text")
        if self._has_increments:
            earlier, texts = self._earlier.setdefault(choice, ([], []))
            earlier.extend(tokens)
            texts.append(text or "")
            tokens = earlier
        if fields.prediction is not None and meta.get("finish_reason"):
            counts = await asyncio.get_running_loop().run_in_executor(None, _predicted, fields.prediction, tokens)
            meta.update(counts)
            if self._call is not None:
                self._call.counts[choice] = counts
        trace = meta.get(META_KEY)
        if trace is None:
            return
        text = "".join(texts) if self._has_increments else text
        trace["choice"] = choice
        if fields.notes:
            trace["notes"] = [*fields.notes]
        is_whole = len(tokens) == meta["completion_tokens"]
        if "stretches" in trace and is_whole and self._manager.tokenizer is not None:
            self._place(choice, trace, tokens, text)
        if self._call is not None and self._call.form != "native":
            # Taken out, since with `return_meta_info` the response would carry the trace twice.
            self._call.traces.append((meta.pop(META_KEY), text))

    def _place(self, choice: int, trace: dict[str, Any], tokens: list[int], text: str | None) -> None:
        """Add to the stretches of a full trace their places in `text`, the text of all output `tokens`."""
        own = of_choice(parameters_of(self._obj), self._obj, choice)
        decoder = decoder_of(self._manager, own if isinstance(own, dict) else {})
        pieces = [decoder.take(token)[0] for token in tokens]
        place(trace, [*pieces[:-1], *(piece + decoder.begun for piece in pieces[-1:])], text)
        if self._has_increments:
            trace.setdefault("text", text)  # the answer's last output has only its end

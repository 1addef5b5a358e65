"""Complete the outputs of requests that asked for a trace or sent a prediction, while they pass SGLang's HTTP process.

A trace arrives in the `meta_info` of its request's last output, and the places of its stretches in the text are added
here; the OpenAI routes show it as `sglext`. Counts of predicted tokens go into the last output. They compare only
tokens, so they depend neither on the drafters nor on the rest of the batch.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from whiflash_sglang.copying.predicted import Prediction
from whiflash_sglang.engine.carried import META_KEY
from whiflash_sglang.http.reader import Asked, Call, of_choice, parameters_of
from whiflash_sglang.spans.vocabulary import Vocabulary, vocabulary_of
from whiflash_sglang.telemetry.trace import pieces_of, place

ACCEPTED, REJECTED = "accepted_prediction_tokens", "rejected_prediction_tokens"


def followed(
    manager: Any, obj: Any, call: Call | None, asked: list[Asked], outputs: AsyncIterator[Any]
) -> AsyncIterator[Any]:
    """Return the outputs of a request; SGLang's own iterator if it asked for no trace and sent no prediction. A trace
    gets the index of its choice. It stays in a native request's output; for other calls `writer` sends it.
    """
    if all(one.hints.trace is None and one.prediction is None for one in asked):
        return outputs
    return _Answers(manager, obj, call, asked).follow(outputs)


class _Answers:
    """Completes the outputs of one request. The increments of a stream are joined first."""

    def __init__(self, manager: Any, obj: Any, call: Call | None, asked: list[Asked]) -> None:
        self._manager, self._obj, self._call, self._asked = manager, obj, call, asked
        self._increments = bool(getattr(obj, "stream", False)) and manager.incremental_streaming_output
        self._earlier: dict[int, tuple[list[int], list[str]]] = {}

    async def follow(self, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for output in outputs:
            for number, item in enumerate(output if isinstance(output, list) else [output]):
                if isinstance(item, dict) and isinstance(item.get("meta_info"), dict):
                    await self._take(item, item.get("index", number))
            yield output

    async def _take(self, item: dict[str, Any], choice: int) -> None:
        asked, meta = of_choice(self._asked, self._obj, choice), item["meta_info"]
        tokens, text = item.get("output_ids") or [], item.get("text")
        if self._increments:
            before = self._earlier.setdefault(choice, ([], []))
            before[0].extend(tokens)
            before[1].append(text or "")
            tokens = before[0]
        if asked.prediction is not None and meta.get("finish_reason"):
            counts = await _counted(asked.prediction, tokens)
            meta.update(counts)
            if self._call is not None:
                self._call.counts[choice] = counts
        trace = meta.get(META_KEY)
        if trace is None:
            return
        text = "".join(before[1]) if self._increments else text
        trace["choice"] = choice
        if asked.notes:
            trace["notes"] = [*asked.notes]
        is_whole = len(tokens) == meta["completion_tokens"]
        if "stretches" in trace and is_whole and self._manager.tokenizer is not None:
            place_text(self._manager, self._obj, choice, trace, tokens, text)
            if self._increments:
                trace.setdefault("text", text)  # the answer's last output has only its end
        if self._call is not None and self._call.form != "native":
            # Taken out, since with `return_meta_info` the response would carry the trace twice.
            self._call.traces.append((meta.pop(META_KEY), text))


async def _counted(prediction: Sequence[int], answer: Sequence[int]) -> dict[str, int]:
    found = Prediction(prediction)
    await asyncio.get_running_loop().run_in_executor(None, found.follow, answer)
    return {ACCEPTED: found.accepted, REJECTED: found.rejected}


def summed(counts: Mapping[int, Mapping[str, int]]) -> dict[str, int]:
    """Return the numbers of accepted and rejected prediction tokens, over all choices of a request."""
    return {name: sum(one[name] for one in counts.values()) for name in (ACCEPTED, REJECTED)}


def place_text(
    manager: Any, obj: Any, choice: int, trace: dict[str, Any], tokens: list[int], text: str | None
) -> None:
    """Add to the stretches of a full trace their places in `text`, the text of all output `tokens`."""
    vocabulary = _vocabulary(manager)
    own = of_choice(parameters_of(obj), obj, choice)
    keeps_special = isinstance(own, dict) and not own.get("skip_special_tokens", True)
    skipped = frozenset[int]() if keeps_special else vocabulary.special
    place(trace, pieces_of(tokens, vocabulary.token_bytes, skipped), text)


def _vocabulary(manager: Any) -> Vocabulary:
    """Return the tokenizer's vocabulary, which is read when the first full trace needs it."""
    found: Vocabulary | None = getattr(manager, "_whiflash_vocabulary", None)
    if found is None:
        found = manager._whiflash_vocabulary = vocabulary_of(manager.tokenizer)
    return found


def with_text(trace: dict[str, Any], text: str | None, shown: str | None) -> dict[str, Any]:
    """Return the trace, with the text that its offsets refer to only if its client was shown another text."""
    if "stretches" in trace and text is not None:
        if text != (shown or ""):
            trace.setdefault("text", text)
        elif trace.get("text") == text:
            del trace["text"]
    return trace

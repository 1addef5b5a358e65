"""Outputs of a request that asked, completed while they pass in SGLang's HTTP process: traces by what only text shows,
and the last ones by what of a prediction appeared.

A trace arrives in the `meta_info` of its request's last output; the OpenAI routes show it as `sglext`. Counts of a
prediction are of tokens alone, so they are the same whoever drafted and whatever ran beside the request.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from whiflash_sglang.copying.predicted import Prediction
from whiflash_sglang.engine.carried import META_KEY
from whiflash_sglang.engine.http.requests import Asked, Call, of_choice, parameters_of
from whiflash_sglang.spans.vocabulary import Vocabulary, vocabulary_of
from whiflash_sglang.telemetry.trace import pieces_of, place

ACCEPTED, REJECTED = "accepted_prediction_tokens", "rejected_prediction_tokens"


def followed(
    manager: Any, obj: Any, call: Call | None, asked: list[Asked], outputs: AsyncIterator[Any]
) -> AsyncIterator[Any]:
    """The outputs of a request. Traces have the choice that each is of, and stay in outputs that clients see; of other
    calls they are kept for what is sent (`answers`). Requests that asked for nothing get SGLang's own outputs.
    """
    if all(one.hints.trace is None and one.prediction is None for one in asked):
        return outputs
    return _Answers(manager, obj, call, asked).follow(outputs)


class _Answers:
    """Answers to one request so far. Streams of increments are put together."""

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
                trace.setdefault("text", text)  # the answer's last line holds its end alone
        if self._call is not None and self._call.form != "native":
            # Taken out: with `return_meta_info` the response would carry it twice.
            self._call.traces.append((meta.pop(META_KEY), text))


async def _counted(prediction: Sequence[int], answer: Sequence[int]) -> dict[str, int]:
    found = Prediction(prediction)
    await asyncio.get_running_loop().run_in_executor(None, found.follow, answer)
    return {ACCEPTED: found.accepted, REJECTED: found.rejected}


def summed(counts: Mapping[int, Mapping[str, int]]) -> dict[str, int]:
    """Counts of a request's predictions that appeared, over all its choices."""
    return {name: sum(one[name] for one in counts.values()) for name in (ACCEPTED, REJECTED)}


def place_text(
    manager: Any, obj: Any, choice: int, trace: dict[str, Any], tokens: list[int], text: str | None
) -> None:
    """Give the stretches of a full trace their places in the text of all its output `tokens`."""
    vocabulary = _vocabulary(manager)
    own = of_choice(parameters_of(obj), obj, choice)
    keeps_special = isinstance(own, dict) and not own.get("skip_special_tokens", True)
    skipped = frozenset[int]() if keeps_special else vocabulary.special
    place(trace, pieces_of(tokens, vocabulary.token_bytes, skipped), text)


def _vocabulary(manager: Any) -> Vocabulary:
    """The tokenizer's, read at the first full trace."""
    found: Vocabulary | None = getattr(manager, "_whiflash_vocabulary", None)
    if found is None:
        found = manager._whiflash_vocabulary = vocabulary_of(manager.tokenizer)
    return found


def with_text(trace: dict[str, Any], text: str | None, shown: str | None) -> dict[str, Any]:
    """The trace, with the text that its offsets count in where its client was shown another one, and only there."""
    if "stretches" in trace and text is not None:
        if text != (shown or ""):
            trace.setdefault("text", text)
        elif trace.get("text") == text:
            del trace["text"]
    return trace

"""Traces in SGLang's HTTP process: completed with what only text shows, and put where clients look for them.

A trace arrives in the `meta_info` of its request's last output; the OpenAI routes show it as `sglext`.
"""

from collections.abc import AsyncIterator, Iterable
from typing import Any

from whiflash_sglang.engine.carried import META_KEY
from whiflash_sglang.engine.http import predictions
from whiflash_sglang.engine.http.call import Call
from whiflash_sglang.spans.hints import HintError, parse_hints
from whiflash_sglang.spans.vocabulary import token_bytes
from whiflash_sglang.telemetry.trace import pieces_of, place


async def followed(
    manager: Any, obj: Any, call: Call | None, outputs: AsyncIterator[Any]
) -> AsyncIterator[Any]:
    """The outputs of a request, with its traces completed: the choice that each is of, and what only text shows.

    They stay in outputs that clients see; of other calls they are kept for what is sent (`answers`).
    """
    arrived = _Arrived(manager, obj, call)
    async for output in outputs:
        for choice, item in predictions.choices_of(output):
            arrived.take(item, choice)
        yield output


class _Arrived:
    """Answers of one request so far. Streams of increments are put together for those that need the whole."""

    def __init__(self, manager: Any, obj: Any, call: Call | None) -> None:
        self._manager, self._obj = manager, obj
        self._call = None if call is None or call.form == "native" else call
        increments = bool(getattr(obj, "stream", False)) and manager.incremental_streaming_output
        self._earlier: dict[int, tuple[list[int], list[str]]] | None = (
            {} if increments and asks_text(predictions.parameters_of(obj)) else None
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
        if self._call is not None:
            # Taken out: with `return_meta_info` the response would carry it twice.
            self._call.traces.append((item["meta_info"].pop(META_KEY), text))


def place_text(
    manager: Any, obj: Any, choice: int, trace: dict[str, Any], tokens: list[int], text: str | None
) -> None:
    """Give the stretches of a full trace their places in the text of all its output `tokens`."""
    vocabulary, special = _vocabulary(manager)
    skipped = special if _skips_special_tokens(obj, choice) else frozenset[int]()
    place(trace, pieces_of(tokens, vocabulary, skipped), text)


def asks_text(every: Iterable[Any]) -> bool:
    """Whether any of these sampling parameters ask for a full trace, which is the kind that speaks of text."""
    for parameters in every:
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
    """Tokens that decoding leaves out: every one added as special, not only those with a part to play (end, pad)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def with_text(trace: dict[str, Any], text: str | None, shown: str | None) -> dict[str, Any]:
    """The trace, with the text that its offsets count in where its client was shown another one, and only there."""
    if "stretches" in trace and text is not None:
        if text != (shown or ""):
            trace.setdefault("text", text)
        elif trace.get("text") == text:
            del trace["text"]
    return trace

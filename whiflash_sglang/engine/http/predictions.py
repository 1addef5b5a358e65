"""Predicted outputs in the process that serves HTTP: as token ids, and what of them appeared, in the answer's usage.

The counts are of tokens alone, so they are the same whoever drafted and whatever ran beside the request. Answers to
requests without a prediction are SGLang's own.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from whiflash_sglang.copying.predicted import Prediction
from whiflash_sglang.engine.carried import settings_of
from whiflash_sglang.engine.http.call import Call
from whiflash_sglang.spans.hints import CARRIED_PREDICTION, HintError
from whiflash_sglang.spans.prediction import prediction_reader

T = TypeVar("T")
ACCEPTED, REJECTED = "accepted_prediction_tokens", "rejected_prediction_tokens"
_NOTES = "_whiflash_prediction_notes"
_KEY = "lookup.prediction_tokens of the bundle"


async def encoded(manager: Any, obj: Any) -> None:
    """Put token ids in the place of predicted texts, beside the event loop.

    Raises:
        ValueError: one is malformed; SGLang answers it with 400.
    """
    read = [await _encoded(manager, one) for one in parameters_of(obj)]
    found = [parameters for parameters, _ in read]
    if any(found):
        obj.sampling_params = found if isinstance(obj.sampling_params, list) else found[0]
    if any(notes for _, notes in read):
        obj.__dict__[_NOTES] = [notes for _, notes in read]


def parameters_of(obj: Any) -> list[Any]:
    """The sampling parameters of an internal request: one for all prompts, or one for each."""
    given = getattr(obj, "sampling_params", None)
    return given if isinstance(given, list) else [given]


def choices_of(output: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Parts of an output, each with the number of its choice."""
    for number, item in enumerate(output if isinstance(output, list) else [output]):
        if isinstance(item, dict) and isinstance(item.get("meta_info"), dict):
            yield item.get("index", number), item


def of_choice(values: Sequence[T], obj: Any, choice: int) -> T:
    """The value of the prompt that `choice` answers: SGLang numbers the choices of a batch prompt by prompt.

    values: one for all prompts, or one for each, repeated or not.
    """
    return values[choice // getattr(obj, "parallel_sample_num", 1)] if len(values) > 1 else values[0]


def notes_of(obj: Any, choice: int) -> list[str]:
    """Notes on a choice's prediction for its trace."""
    notes: list[list[str]] = getattr(obj, _NOTES, None) or [[]]
    return of_choice(notes, obj, choice)


async def _encoded(manager: Any, parameters: Any) -> tuple[Any, list[str]]:
    """The parameters with token ids, and what their choices' traces have to say about it."""
    params = parameters.get("custom_params") if isinstance(parameters, dict) else None
    if not isinstance(params, dict) or params.get(CARRIED_PREDICTION) is None:
        return parameters, []
    longest = settings_of(manager.server_args).lookup.prediction_tokens
    read = prediction_reader(manager.tokenizer, longest, manager.model_config.vocab_size)
    try:
        found = await asyncio.get_running_loop().run_in_executor(None, read, params)
    except HintError as error:
        raise ValueError(str(error)) from None
    assert found is not None
    notes = [f"the prediction was cut to its first {longest} tokens ({_KEY})"] if found.is_cut else []
    return {**parameters, "custom_params": {**params, CARRIED_PREDICTION: found.tokens}}, notes


async def followed(
    manager: Any, obj: Any, call: Call | None, outputs: AsyncIterator[Any]
) -> AsyncIterator[Any]:
    """The outputs of a request; of one with a prediction the last ones say in `meta_info` what of it appeared."""
    predicted = [_tokens(one) for one in parameters_of(obj)]
    if all(tokens is None for tokens in predicted):
        async for output in outputs:
            yield output
        return
    increments = bool(getattr(obj, "stream", False)) and manager.incremental_streaming_output
    written: dict[int, list[int]] = {}
    async for output in outputs:
        for choice, item in choices_of(output):
            tokens = of_choice(predicted, obj, choice)
            if tokens is not None:
                answer = item.get("output_ids") or []
                written[choice] = written.get(choice, []) + answer if increments else answer
                if item["meta_info"].get("finish_reason"):
                    counts = await _counted(tokens, written.pop(choice))
                    item["meta_info"].update(counts)
                    if call is not None:
                        call.counts[choice] = counts
        yield output


def _tokens(parameters: Any) -> list[int] | None:
    params = parameters.get("custom_params") if isinstance(parameters, dict) else None
    return params.get(CARRIED_PREDICTION) if isinstance(params, dict) else None


async def _counted(tokens: Sequence[int], answer: Sequence[int]) -> dict[str, int]:
    prediction = Prediction(tokens)
    await asyncio.get_running_loop().run_in_executor(None, prediction.follow, answer)
    return {ACCEPTED: prediction.accepted, REJECTED: prediction.rejected}


def summed(counts: Mapping[int, Mapping[str, int]]) -> dict[str, int]:
    """Counts of a request's predictions that appeared, over all its choices."""
    return {name: sum(one[name] for one in counts.values()) for name in (ACCEPTED, REJECTED)}

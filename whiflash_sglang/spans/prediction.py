"""Predicted outputs on the wire: OpenAI's `prediction`, and the key of `custom_params` that carries one.

`docs/reference/hints.md` documents both. A body's `prediction` becomes the text under that key, and the text becomes
token ids before the request is scheduled. Token ids are accepted too, as SGLang accepts `input_ids`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from whiflash_sglang.spans.hints import CARRIED_PREDICTION, HintError, utf8

FIELD: Final = f"custom_params.{CARRIED_PREDICTION}"

MAX_TOKEN_CHARS: Final = 16
"""Largest mean of characters per token of a prediction. Text beyond it is cut before the tokenizer encodes it."""

ReadPrediction = Callable[[object], tuple[Sequence[int], bool] | None]
"""Reads the prediction in `custom_params`: its token ids, and whether it was cut; None without one. Raises
HintError."""


def body_prediction(body: object) -> str | None:
    """Return the text of an OpenAI request's `prediction`; None without one.

    Raises: HintError, and nothing else, naming the field that is wrong.
    """
    raw = body.get("prediction") if isinstance(body, Mapping) else None
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise HintError("prediction", "must be an object of type and content")
    if raw.get("type") != "content":
        raise HintError("prediction.type", "must be content")
    content = raw.get("content")
    if isinstance(content, str):
        return _text("prediction.content", content)
    if not isinstance(content, list):
        raise HintError("prediction.content", "must be a string or a list of text parts")
    return "".join(_part(f"prediction.content[{i}]", part) for i, part in enumerate(content))


def prediction_reader(tokenizer: Any, most: int, vocabulary: int) -> ReadPrediction:
    """Return a function that reads the first `most` tokens of the prediction in `custom_params`.

    A prediction does not change the answer, so a long one is cut and not refused: its beginning is worth copying from.

    Args:
        tokenizer: a `transformers` tokenizer, or None. vocabulary: number of ids of the target.
    """

    def read(custom_params: object) -> tuple[Sequence[int], bool] | None:
        carried = custom_params.get(CARRIED_PREDICTION) if isinstance(custom_params, dict) else None
        if carried is None:
            return None
        characters = most * MAX_TOKEN_CHARS
        is_cut = isinstance(carried, str) and len(carried) > characters
        if isinstance(carried, str):
            _text(FIELD, carried)
            if tokenizer is None:
                raise HintError(FIELD, "must be token ids: this server has no tokenizer")
            carried = list(tokenizer.encode(carried[:characters], add_special_tokens=False))
        elif not isinstance(carried, list):
            raise HintError(FIELD, "must be a string or a list of token ids")
        return check_ids(FIELD, carried[:most], vocabulary), is_cut or len(carried) > most

    return read


def check_ids(field: str, ids: list[Any], vocabulary: int) -> list[int]:
    """Return the ids if all are token ids below `vocabulary`. Raises HintError naming the first that is not."""
    for i, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise HintError(f"{field}[{i}]", f"must be a token id below {vocabulary}")
    return ids


def _part(field: str, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise HintError(f"{field}.type", "must be text")
    text = part.get("text")
    if not isinstance(text, str):
        raise HintError(f"{field}.text", "must be a string")
    return _text(f"{field}.text", text)


def _text(field: str, text: str) -> str:
    utf8(field, text)
    return text

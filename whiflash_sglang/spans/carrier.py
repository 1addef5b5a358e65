"""Bounds on `custom_params`: anything else would fail inside SGLang's scheduler instead of being refused."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from whiflash_sdk.hints import INFERRED_KEY, MAX_BYTES, WIRE_KEY

from whiflash_sglang.files.jsonl import read_json
from whiflash_sglang.spans.hints import (
    CARRIED_FORCED,
    CARRIED_PREDICTION,
    TOOLS_KEY,
    HintError,
    RequestHints,
    parse_hints,
    printable,
    utf8,
)

_MAX_VALUES: Final = 1024
_MAX_CHARS: Final = 16384


def validate_custom_params(custom_params: object) -> RequestHints:
    """`parse_hints`, after checking that the rest of `custom_params` can reach the scheduler at all.

    SGLang sends it on as msgpack and decodes it as scalars, lists of scalars and objects of scalars;
    anything else fails inside the scheduler instead of being refused. For the HTTP process only.

    Raises: HintError, and nothing else, naming the field that is wrong.
    """
    hints = parse_hints(custom_params)
    if isinstance(custom_params, dict):
        _check_carrier(custom_params)
    return hints


def add_hints(custom_params: Mapping[str, Any] | None, fields: Mapping[str, object]) -> dict[str, Any] | None:
    """`custom_params` that were validated, with hints that say `fields` too; None: they would be too long."""
    params = dict(custom_params or {})
    carried = read_json(params.get(WIRE_KEY) or "{}")
    text = json.dumps({**carried, **fields}, ensure_ascii=False, separators=(",", ":"))
    return {**params, WIRE_KEY: text} if len(text.encode()) <= MAX_BYTES else None


def _check_carrier(params: dict[object, object]) -> None:
    """Every value a scalar, a list of scalars or an object of scalars, within the carrier's bounds."""
    values, chars = _MAX_VALUES, _MAX_CHARS
    for key, value in params.items():
        if not isinstance(key, str):
            raise HintError("custom_params", "has a name that is not a string")
        if key in (CARRIED_PREDICTION, CARRIED_FORCED):
            continue  # They have bounds of their own.
        if key == TOOLS_KEY:
            raise _carrier_error(key, "is written by the server only; leave it out")
        if key == INFERRED_KEY and value is not True:
            raise _carrier_error(key, "must be true; leave it out if the spans are the caller's own")
        values -= len(value) if isinstance(value, dict | list) else 1
        if values < 0:
            raise _carrier_error(key, f"makes custom_params hold more than {_MAX_VALUES} values")
        for scalar in (key, *_scalars(key, value)):
            if isinstance(scalar, str):
                chars -= len(scalar)
                _check_text(key, scalar, chars)
            elif scalar is not None and not isinstance(scalar, float):
                _check_integer(key, scalar)


def _carrier_error(key: str, reason: str) -> HintError:
    return HintError(f"custom_params.{printable(key)}", reason)


def _scalars(key: str, value: object) -> Iterable[object]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return (value,)
    if not all(isinstance(name, str) for name in value):
        raise _carrier_error(key, "has a name that is not a string")
    return (*value, *value.values())


def _check_text(key: str, text: str, chars_left: int) -> None:
    if chars_left < 0:
        raise _carrier_error(key, f"makes custom_params hold more than {_MAX_CHARS} characters of text")
    utf8(f"custom_params.{printable(key)}", text)


def _check_integer(key: str, value: object) -> None:
    if not isinstance(value, int):
        raise _carrier_error(key, "nests deeper than a list or an object of scalars")
    if not -(2**63) <= value < 2**64:
        raise _carrier_error(key, "holds an integer of more than 64 bits")

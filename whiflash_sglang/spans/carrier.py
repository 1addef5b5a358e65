"""Checks and completes a request's `custom_params` in the HTTP process."""

import json
from collections.abc import Mapping
from typing import Any

from whiflash_sdk.hints import INFERRED_KEY, MAX_BYTES, WIRE_KEY

from whiflash_sglang.files.jsonl import read_json
from whiflash_sglang.spans.hints import TOOLS_KEY, HintError, RequestHints, parse_hints


def validate_custom_params(custom_params: object) -> RequestHints:
    """Parse the hints (`parse_hints`), and refuse the keys that only the server may write. The types of SGLang's
    scheduler check other values when the request is admitted (`http/admission.py`).

    Raises: HintError, and nothing else, naming the field that is wrong.
    """
    hints = parse_hints(custom_params)
    if isinstance(custom_params, dict):
        if TOOLS_KEY in custom_params:
            raise HintError(f"custom_params.{TOOLS_KEY}", "is written by the server only; leave it out")
        if custom_params.get(INFERRED_KEY, True) is not True:
            why = "must be true; leave it out if the spans are the caller's own"
            raise HintError(f"custom_params.{INFERRED_KEY}", why)
    return hints


def add_hints(custom_params: Mapping[str, Any] | None, fields: Mapping[str, object]) -> dict[str, Any] | None:
    """Add `fields` to the hints in validated `custom_params`; None if the hints would be longer than `MAX_BYTES`."""
    params = dict(custom_params or {})
    text = json.dumps({**read_json(params.get(WIRE_KEY) or "{}"), **fields}, ensure_ascii=False, separators=(",", ":"))
    return {**params, WIRE_KEY: text} if len(text.encode()) <= MAX_BYTES else None

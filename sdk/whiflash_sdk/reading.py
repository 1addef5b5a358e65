"""JSON that others wrote: clients, servers and models."""

from __future__ import annotations

import json
from typing import Any, Final

DEEPEST: Final = 200
"""Levels of lists and objects. Pydantic's reader has the same bound."""
_TOO_DEEP: Final = f"JSON nests deeper than {DEEPEST} levels; nothing of it was read"


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text, shallow enough for recursive functions.

    Raises: ValueError for text that is not JSON, and for more than `DEEPEST` levels.
    """
    try:
        found = json.loads(text)  # noqa: TID251 (here it is bounded)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    marks = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, marks)) > DEEPEST and _is_deep(found):  # type: ignore[arg-type]
        raise ValueError(_TOO_DEEP)
    return found


def _is_deep(found: Any) -> bool:
    holders = [found]
    for _ in range(DEEPEST):
        inside = (holder.values() if isinstance(holder, dict) else holder for holder in holders)
        holders = [value for values in inside for value in values if isinstance(value, dict | list)]
    return bool(holders)

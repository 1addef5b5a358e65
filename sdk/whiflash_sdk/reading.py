"""Reads and edits JSON that others wrote: clients, servers and models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

DEEPEST: Final = 200
"""Most nested levels of lists and objects. Pydantic's reader has the same bound."""
_EMPTY: Final = re.compile(rb"[ \t\r\n]*\}")


class TooDeepError(ValueError):
    """A JSON text nests deeper than `DEEPEST` levels, and may be valid otherwise."""

    def __init__(self) -> None:
        super().__init__(f"JSON nests deeper than {DEEPEST} levels; nothing of it was read")


def read_json(text: str | bytes) -> Any:
    """Read the value of a JSON text, shallow enough for recursive functions.

    Raises: ValueError for text that is not JSON; TooDeepError, which is one, for more than `DEEPEST` levels.
    """
    try:
        value = json.loads(text)  # noqa: TID251 (here it is bounded)
    except RecursionError:
        raise TooDeepError from None
    marks = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, marks)) > DEEPEST and is_deep(value):  # type: ignore[arg-type]
        raise TooDeepError
    return value


def json_or_none(text: str | bytes) -> Any:
    """Read the value of a JSON text; None if `read_json` raises for it."""
    try:
        return read_json(text)
    except ValueError:
        return None


def text_or_none(value: object) -> str | None:
    """Return a value from others' JSON if it is a string, else None."""
    return value if isinstance(value, str) else None


def is_deep(document: Any) -> bool:
    """Whether a JSON value nests deeper than `DEEPEST`, which bounds the recursion of code that reads or writes it."""
    holders = [document]
    for _ in range(DEEPEST):
        inside = (holder.values() if isinstance(holder, dict) else holder for holder in holders)
        holders = [value for values in inside for value in values if isinstance(value, dict | list)]
    return bool(holders)


def edit_json(text: bytes, old: Mapping[str, Any], new: Mapping[str, Any]) -> bytes:
    """Return the JSON object with the members `new`. Members that are only added go in front, and the rest stays as it
    was written: numbers, repeated keys and escapes. If nothing changes, it returns the same `text`.

    old: the value of `text`, or empty if it was not read.
    """
    changed = [name for name in {**old, **new} if name not in old or old[name] != new.get(name)]
    if not changed:
        return text
    if not old.keys().isdisjoint(changed):
        return json.dumps(dict(new)).encode()
    begin = text.index(b"{") + 1
    added = ",".join(f"{json.dumps(name)}:{json.dumps(new[name])}" for name in changed)
    end = b"" if _EMPTY.match(text, begin) else b","
    return b"".join((text[:begin], added.encode(), end, memoryview(text)[begin:]))

"""JSON that others wrote: clients, servers and models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

DEEPEST: Final = 200
"""Levels of lists and objects. Pydantic's reader has the same bound."""
_BETWEEN: Final = re.compile(r"[ \t\r\n:,]*")
_EMPTY: Final = re.compile(rb"[ \t\r\n]*\}")


class TooDeepError(ValueError):
    """A JSON text that may be right, and nests deeper than it is read."""

    def __init__(self) -> None:
        super().__init__(f"JSON nests deeper than {DEEPEST} levels; nothing of it was read")


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text, shallow enough for recursive functions.

    Raises: ValueError for text that is not JSON; TooDeepError, which is one, for more than `DEEPEST` levels.
    """
    try:
        value = json.loads(text)  # noqa: TID251 (here it is bounded)
    except RecursionError:
        raise TooDeepError from None
    marks = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, marks)) > DEEPEST and _is_deep(value):  # type: ignore[arg-type]
        raise TooDeepError
    return value


def json_or_none(text: str | bytes) -> Any:
    """`read_json`; None for text that it does not read."""
    try:
        return read_json(text)
    except ValueError:
        return None


def text_or_none(value: object) -> str | None:
    """A value of others' JSON, which may be anything, if it is text."""
    return value if isinstance(value, str) else None


def _is_deep(document: Any) -> bool:
    holders = [document]
    for _ in range(DEEPEST):
        inside = (holder.values() if isinstance(holder, dict) else holder for holder in holders)
        holders = [value for values in inside for value in values if isinstance(value, dict | list)]
    return bool(holders)


def edit_json(text: bytes, old: Mapping[str, Any], new: Mapping[str, Any]) -> bytes:
    """A JSON object with other members; those of `new` that are the ones of `old` stay as they were written.

    So numbers, repeated keys and escapes pass unchanged. The same `text` is returned if nothing changes.

    old: the value of `text`, or none of its members, in front of which the new ones go then.
    """
    changed = [name for name in {**old, **new} if name not in old or not _same(old[name], new.get(name))]
    if not changed:
        return text
    if not old.keys().isdisjoint(changed):
        return _rewritten(text.decode(), old, new, changed).encode()
    begin = text.index(b"{") + 1
    added = ",".join(_member(name, json.dumps(new[name])) for name in changed)
    end = b"" if _EMPTY.match(text, begin) else b","
    return b"".join((text[:begin], added.encode(), end, memoryview(text)[begin:]))


def _rewritten(text: str, old: Mapping[str, Any], new: Mapping[str, Any], changed: list[str]) -> str:
    members = list(_members(text))
    values = {name: value for name, _, value in members}
    kept = [member for name, member, _ in members if name not in changed]
    for name in changed:
        was, now = old.get(name), new.get(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            kept.append(_member(name, edit_json(values[name].encode(), was, now).decode()))
        elif name in new:
            kept.append(_member(name, json.dumps(now)))
    return "{" + ",".join(kept) + "}"


def _same(was: Any, now: Any) -> bool:
    return was is now or was == now


def _member(name: str, value: str) -> str:
    return f"{json.dumps(name)}:{value}"


def _members(text: str) -> Iterator[tuple[str, str, str]]:
    """Members of an object: the name of each, its text, and the text of its value."""
    decode = json.JSONDecoder().raw_decode
    at = _next(text, text.index("{") + 1)
    while text[at] != "}":
        name, end = decode(text, at)
        begin = _next(text, end)
        _, end = decode(text, begin)
        yield name, text[at:end], text[begin:end]
        at = _next(text, end)


def _next(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    return at if match is None else match.end()

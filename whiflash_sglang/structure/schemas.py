"""The words of a schema: names of properties and tools, and the values that it lists."""

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from whiflash_sglang.spans.fields import json_of
from whiflash_sglang.structure.layout import NO_FRAMES, Frames

MOST_WORDS = 128
"""Words of one schema that are looked at; each is asked for where a name or a listed value begins."""

MOST_CHARS = 1 << 20
"""Longer schemas are not read."""

CONTENTS = ("schema", "json_schema")
"""Where a structural tag has its schemas."""

LISTED = ("enum", "const")


@lru_cache(maxsize=256)
def words_of(text: str) -> tuple[str, ...]:
    """As they stand inside JSON strings, in the schema's order, none twice; none where it is no JSON.

    Args:
        text: a JSON schema, or a structural tag in either of SGLang's formats.
    """
    found: dict[str, None] = {}
    for word in _words(_read(text)):
        found.setdefault(json.dumps(word, ensure_ascii=False)[1:-1])
        if len(found) == MOST_WORDS:
            break
    return tuple(found)


@lru_cache(maxsize=256)
def frames_of(text: str) -> Frames:
    """What stands around the JSON in a structural tag, in either of SGLang's formats; nothing of what is none."""
    begins: dict[str, None] = {}
    ends: dict[str, None] = {}
    for part in _parts(text):
        begin, end = part.get("begin"), part.get("end")
        if isinstance(begin, str) and isinstance(end, str) and '"' in begin and len(begins) < MOST_WORDS:
            begins[begin], ends[end] = None, None
    return Frames(tuple(begins), tuple(filter(None, ends))) if begins else NO_FRAMES


@lru_cache(maxsize=256)
def forced_contents(text: str) -> frozenset[str]:
    """Of a structural tag that must be used: the schemas in it, as `canonical` writes them; else none."""
    parts = list(_parts(text))
    if not any(part.get("at_least_one") is True for part in parts):
        return frozenset()
    return frozenset(canonical(part[name]) for part in parts for name in CONTENTS if name in part)


def canonical(schema: Any) -> str:
    """Equal schemas are written alike."""
    return json.dumps(schema, sort_keys=True)


def _parts(text: str) -> Iterator[dict[str, Any]]:
    """Objects of a structural tag; schemas are data."""
    open_ = [_read(text)]
    while open_:
        part = open_.pop()
        if isinstance(part, list):
            open_ += reversed(part)
        elif isinstance(part, dict):
            yield part
            open_ += reversed([value for name, value in part.items() if name not in CONTENTS])


def _read(text: str) -> Any:
    """None where it is no JSON, or too long."""
    try:
        return json_of(text) if len(text) <= MOST_CHARS else None
    except (ValueError, RecursionError):
        return None


def _words(schema: Any) -> Iterator[str]:
    """Breadth does not matter, order does: a key comes before what is inside it."""
    open_ = [schema]
    while open_:
        part = open_.pop()
        if isinstance(part, list):
            open_ += reversed(part)
        elif isinstance(part, dict):
            properties = part.get("properties")
            if isinstance(properties, dict):
                yield from (name for name in properties if isinstance(name, str))
            for name in LISTED:
                listed = part.get(name)
                values = listed if isinstance(listed, list) else [listed]
                yield from (value for value in values if isinstance(value, str))
            begin = part.get("begin")
            if isinstance(begin, str):
                yield from begin.split('"')[3:4]  # <tool_call>{"name":"NAME", …
            open_ += reversed(
                [value for name, value in part.items() if name not in LISTED or isinstance(value, dict)]
            )

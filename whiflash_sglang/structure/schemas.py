"""The words of a schema: names of properties and tools, and the values that it lists."""

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

MOST_WORDS = 128
"""Words of one schema that are looked at; each is asked for where a name or a listed value begins."""

MOST_CHARS = 1 << 20
"""Longer schemas are not read."""

LISTED = ("enum", "const")


@lru_cache(maxsize=256)
def words_of(text: str) -> tuple[str, ...]:
    """As they stand inside JSON strings, in the schema's order, none twice; none where it is no JSON.

    Args:
        text: a JSON schema, or a structural tag in either of SGLang's formats.
    """
    if len(text) > MOST_CHARS:
        return ()
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    found: dict[str, None] = {}
    for word in _words(schema):
        found.setdefault(json.dumps(word, ensure_ascii=False)[1:-1])
        if len(found) == MOST_WORDS:
            break
    return tuple(found)


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

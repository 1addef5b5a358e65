"""Reads schemas: names of properties and tools, listed values, and whether a grammar of them is bounded."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from whiflash_sglang.spans.hints import json_of
from whiflash_sglang.structure.layout import NO_FRAMES, Frames

MOST_WORDS = 128
"""Largest number of words read of one schema: a matcher is asked for each where a name or a listed value begins."""

MOST_CHARS = 1 << 16
"""Longest schema that is read, in characters: reading one of a mebibyte took 0.8 s."""

CONTENTS = ("schema", "json_schema")
"""Keys under which a structural tag has its schemas."""

LISTED = ("enum", "const")


MOST_NODES = 256
"""Largest number of schemas and listed values, of all tools together, in the grammar of a guessed call."""

MOST_LISTED_CHARS = 4096
"""Characters of listed values in it, at most."""

MOST_NAMED_CHARS = 8192
"""Characters of names of tools and properties in it, at most."""

DEEPEST = 8
"""Levels of schemas in it, at most."""


class Essence:
    """Copies schemas reduced to types, names and listed values, so that their grammar compiles in milliseconds.

    xgrammar takes seconds to hours for others: many optional properties with `minProperties`, repeats in a `pattern`,
    hundreds of levels, long lists. A guess needs none of that. All schemas of one object share its bounds.
    """

    def __init__(self) -> None:
        self._nodes, self._chars, self._named = MOST_NODES, MOST_LISTED_CHARS, MOST_NAMED_CHARS

    def knows(self, name: str) -> bool:
        """Count the characters of a name; return whether all names together are within their bound."""
        self._named -= len(name)
        return self._named >= 0

    def of(self, schema: object, level: int = 0) -> dict[str, Any]:
        """Return the essence of a schema. A part beyond the bounds may be anything."""
        self._nodes -= 1
        if not isinstance(schema, dict) or self._nodes < 0 or level > DEEPEST:
            return {}
        essence: dict[str, Any] = {}
        if isinstance(schema.get("type"), str | list):
            essence["type"] = schema["type"]
        if "const" in schema or isinstance(schema.get("enum"), list):
            listed = schema.get("enum", []) if "const" not in schema else [schema["const"]]
            return {"enum": listed} if self._takes(listed) else essence
        if isinstance(schema.get("properties"), dict):
            essence |= self._object(schema, level)
        if isinstance(schema.get("items"), dict):
            essence["items"] = self.of(schema["items"], level + 1)
        alternatives = schema.get("anyOf")
        if isinstance(alternatives, list) and 0 < len(alternatives) <= self._nodes:
            essence["anyOf"] = [self.of(alternative, level + 1) for alternative in alternatives]
        return essence

    def _object(self, schema: dict[str, Any], level: int) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        for name, value in schema["properties"].items():
            if self._nodes <= 0 or not self.knows(name):
                return {"properties": properties}  # without a list of required ones, others may follow
            properties[name] = self.of(value, level + 1)
        asked = schema.get("required")
        required = [name for name in properties if name in asked] if isinstance(asked, list) else []
        closed = {"additionalProperties": False} if schema.get("additionalProperties") is False else {}
        return {"properties": properties, "required": required, **closed}

    def _takes(self, listed: list[Any]) -> bool:
        self._nodes -= len(listed)
        self._chars -= len(json.dumps(listed))
        return bool(listed) and self._nodes >= 0 and self._chars >= 0


MOST_PLAIN_CHARS = 8192
"""Longest schema, in characters, whose grammar xgrammar may search for forced text without a bound (milliseconds)."""

TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"} | {
    *("structural_tag", "triggered_tags", "tag", "json_schema", "const_string", "any_text")
}
"""Types of schemas, and of parts of a structural tag, that force no more text than they hold."""

REPEATING = frozenset({"$ref", "$dynamicRef", "$recursiveRef", "pattern", "patternProperties"})

COUNTS = ("minItems", "minContains", "minProperties")


@lru_cache(maxsize=256)
def is_plain(text: str) -> bool:
    """Whether a schema spells out all text that its grammar forces: no reference, no pattern, no count above 1.

    False also for other types than `TYPES`, and for a text beyond `MOST_PLAIN_CHARS`.

    Args:
        text: as in `words_of`; empty if the grammar is made of none.
    """
    whole = _read(text) if len(text) <= MOST_PLAIN_CHARS else None
    if not isinstance(whole, dict):
        return False
    for schema in _objects(whole, lambda schema: schema.values()):
        types = schema.get("type", [])
        if not TYPES.issuperset(map(str, types if isinstance(types, list) else [types])):
            return False
        if not REPEATING.isdisjoint(schema) or any(schema.get(name, 0) not in (0, 1) for name in COUNTS):
            return False
    return True


SCALARS = ("string", "number", "integer", "boolean", "null")

PLACED = {"type", "properties", "required", "items", "anyOf", "enum", "const", "additionalProperties"} | {
    *("$ref", "$defs", "definitions", "$schema", "title", "description", "default", "examples")
}
"""Keywords under which `Layout.place` determines what may follow: none of them counts, or looks into text."""

FRAMED = {"type", "format", "structures", "triggers", "tags", "begin", "end", "content", *CONTENTS} | {
    *("at_least_one", "stop_after_first")
}
"""Keys of a structural tag under which it does: text, then JSON between two texts, and again."""


@lru_cache(maxsize=256)
def words_of_places(text: str) -> tuple[str, ...] | None:
    """Return all names and listed values of a schema, sorted; None unless `Layout.place` determines what may follow.

    Args:
        text: a JSON schema, or a structural tag in either of SGLang's formats.
    """
    whole = _read(text)
    if isinstance(whole, dict) and whole.get("type") == "structural_tag":
        roots = open_ = _framed(text)
    else:
        roots, open_ = whole.get("anyOf", [whole]) if isinstance(whole, dict) else [], [whole]
    among = roots if isinstance(roots, list) else []
    kinds = [root.get("type") if isinstance(root, dict) else None for root in among]
    if not kinds or any(kind not in ("object", "array") for kind in kinds):
        return None
    if len(kinds) > 1 and "array" in kinds:
        return None  # items of a whole text decide between alternatives, but are no part of its place
    words: set[str] = set()
    while open_:
        node = open_.pop()
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict) or not PLACED.issuperset(node):
            return None
        named = [node.get(name, {}) for name in ("properties", "$defs", "definitions")]
        enum, alternatives = node.get("enum", []), node.get("anyOf", [])
        if [*map(type, (*named, enum, alternatives))] != [dict, dict, dict, list, list]:
            return None
        listed = [*enum, *([node["const"]] if "const" in node else [])]
        words |= {*named[0], *(value for value in listed if isinstance(value, str))}
        if not all(value is None or isinstance(value, str | bool) for value in listed):
            return None
        open_ += [schema for schemas in named for schema in schemas.values()] + alternatives
        open_ += [node[name] for name in ("items", "additionalProperties") if name in node]
    return tuple(sorted(words)) if all(json.dumps(word) == f'"{word}"' for word in words) else None


def _framed(text: str) -> list[Any]:
    """Return the schemas of a structural tag; none unless each is between texts that `frames_of` has."""
    parts, frames = list(_parts(text)), frames_of(text)
    tags = [part for part in parts if "begin" in part]
    known = all(FRAMED.issuperset(part) and str(part.get("type", "tag")) in TYPES for part in parts)
    if not known or {str(tag["begin"]) for tag in tags} != {*frames.begins} or not all(tag.get("end") for tag in tags):
        return []
    schemas = [part[name] for part in parts for name in CONTENTS if name in part]
    return schemas if len(schemas) == len(tags) else []


@lru_cache(maxsize=256)
def has_alternatives(text: str) -> bool:
    """Whether a place of a JSON schema has several objects or arrays, between which their contents decide."""
    found = [node.get("anyOf") for node in _objects(_read(text), lambda node: node.values())]
    lists = [many for many in found if isinstance(many, list)]
    return any(sum(not isinstance(one, dict) or one.get("type") not in SCALARS for one in many) > 1 for many in lists)


@lru_cache(maxsize=256)
def words_of(text: str) -> tuple[str, ...]:
    """Return a schema's words as JSON strings hold them, in its order, each once; empty if it is not JSON.

    Args:
        text: a JSON schema, or a structural tag in either of SGLang's formats.
    """
    words: dict[str, None] = {}
    for word in _words(_read(text)):
        words.setdefault(json.dumps(word, ensure_ascii=False)[1:-1])
        if len(words) == MOST_WORDS:
            break
    return tuple(words)


@lru_cache(maxsize=256)
def frames_of(text: str) -> Frames:
    """Return the texts around JSON in a structural tag, in either of SGLang's formats; NO_FRAMES if it is none."""
    begins: dict[str, None] = {}
    ends: dict[str, None] = {}
    for tag in _parts(text):
        begin, end = tag.get("begin"), tag.get("end")
        if isinstance(begin, str) and isinstance(end, str) and '"' in begin and len(begins) < MOST_WORDS:
            begins[begin], ends[end] = None, None
    return Frames(tuple(begins), tuple(filter(None, ends))) if begins else NO_FRAMES


@lru_cache(maxsize=256)
def forced_contents(text: str) -> frozenset[str]:
    """Return the schemas of a structural tag that requires a call, as `canonical` writes them; empty if it does not."""
    parts = list(_parts(text))
    if not any(tag.get("at_least_one") is True for tag in parts):
        return frozenset()
    return frozenset(canonical(tag[name]) for tag in parts for name in CONTENTS if name in tag)


def canonical(schema: Any) -> str:
    """Write a schema as JSON: equal schemas have equal texts."""
    return json.dumps(schema, sort_keys=True)


def _parts(text: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a structural tag, without those inside its schemas."""
    return _objects(_read(text), lambda tag: [value for name, value in tag.items() if name not in CONTENTS])


def _objects(whole: Any, inside: Callable[[dict[str, Any]], Iterable[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the objects in JSON, each before those in the values that `inside` returns for it."""
    open_ = [whole]
    while open_:
        value = open_.pop()
        if isinstance(value, list):
            open_ += reversed(value)
        elif isinstance(value, dict):
            yield value
            open_ += reversed(list(inside(value)))


@lru_cache(maxsize=4)
def _read(text: str) -> Any:
    """Parse JSON; None if it is no JSON or too long. The result is cached, so nobody may write into it."""
    try:
        return json_of(text) if len(text) <= MOST_CHARS else None
    except (ValueError, RecursionError):
        return None


def _words(schema: Any) -> Iterator[str]:
    """Yield property names, enum and const strings, and tool names of a schema or structural tag, outer ones first."""

    def inside(node: dict[str, Any]) -> list[Any]:
        return [value for name, value in node.items() if name not in LISTED or isinstance(value, dict)]

    for node in _objects(schema, inside):
        properties = node.get("properties")
        if isinstance(properties, dict):
            yield from (name for name in properties if isinstance(name, str))
        for name in LISTED:
            listed = node.get(name)
            values = listed if isinstance(listed, list) else [listed]
            yield from (value for value in values if isinstance(value, str))
        begin = node.get("begin")
        if isinstance(begin, str):
            yield from begin.split('"')[3:4]  # <tool_call>{"name":"NAME", …

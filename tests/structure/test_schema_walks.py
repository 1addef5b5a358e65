"""Schemas with what real ones have: no draft that a grammar forbids, whatever its masks let a text become."""

import random
from typing import Any

import pytest
from schema_walks import WIDTH, Walked, walk_schema
from structure_grammars import Grammars

from whiflash_sglang.spans.vocabulary import Vocabulary
from whiflash_sglang.structure.sketch import CHARS_PER_TOKEN, TAIL

ANYTHING: dict[str, Any] = {}
SCHEMAS: dict[str, Any] = {
    "references": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "next": {"$ref": "#/$defs/node"}},
                "required": ["city"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "alternatives": {
        "anyOf": [
            {"type": "object", "properties": {"city": {"const": "Paris"}}, "required": ["city"]},
            {
                "type": "object",
                "properties": {"citys": {"enum": [1, 2.5, None, True]}},
                "required": ["citys"],
            },
            {"type": "array", "prefixItems": [{"type": "null"}, {"type": "number"}], "items": False},
        ]
    },
    "optional": {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in (("city", "string"), ("unit", "integer"))},
        "additionalProperties": False,
    },
    "open": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "additionalProperties": {"type": "number"},
    },
    "patterns": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "on": {"type": "string", "format": "date"},
        },
        "required": ["id", "on"],
        "additionalProperties": False,
    },
    "bounds": {
        "type": "array",
        "items": {"type": "integer", "minimum": 98, "maximum": 104},
        "minItems": 3,
        "maxItems": 5,
    },
    "words": {"enum": ["größe", 'a "quoted" one', "back\\slash", "new\nline", "", "größer"]},
    "long": {"const": {"city": "Paris " * 400}},
    "anything": ANYTHING,
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_nothing_forbidden_nothing_moved_and_bounded_work(
    grammars: Grammars, vocabulary: Vocabulary, name: str
) -> None:
    done, rng = Walked(), random.Random(name)
    for _ in range(4):
        walk_schema(grammars, vocabulary, SCHEMAS[name], rng, 40, done)
    assert done.refused == 0
    assert done.tokens > 4
    assert done.forbidden == done.moved == 0
    written = TAIL * max(map(len, vocabulary.token_bytes))
    assert done.most_looks <= 2
    assert done.most_cut <= 2 * (WIDTH * CHARS_PER_TOKEN + written)
    assert done.proposed > 0 or name in ("bounds", "anything")

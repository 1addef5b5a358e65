"""Answers that are kept by the place in a text are those of a grammar that is asked anew."""

import json
from random import Random
from typing import Any

import pytest
import xgrammar

from whiflash_sglang.structure.calls import _compiler, schema_of
from whiflash_sglang.structure.guesses import Guesses, Tables, likely
from whiflash_sglang.structure.layout import Layout
from whiflash_sglang.structure.matchers import XGrammarMatcher
from whiflash_sglang.structure.schemas import words_of, words_of_places
from whiflash_sglang.structure.tools import carried_tools

STRING, NUMBER, BOOL = {"type": "string"}, {"type": "number"}, {"type": "boolean"}


def record(**properties: Any) -> dict[str, Any]:
    """An object whose first property is required."""
    return {"type": "object", "properties": properties, "required": [*properties][:1]}


def closed(**properties: Any) -> dict[str, Any]:
    """One that has all of its properties, and no other."""
    return record(**properties) | {"required": [*properties], "additionalProperties": False}


TAGGED = {"anyOf": [record(kind={"const": "one"}, of=STRING), record(kind={"const": "two"}, of=NUMBER)]}
TOOLS = [
    ("look_up", record(unit={"enum": ["inch", "inches"]}, tags={"type": "array", "items": STRING})),
    ("end", None),
]
CARRIED = str(schema_of(carried_tools(TOOLS, "hermes") or ""))
KEPT = [
    json.dumps({"type": "array", "items": TAGGED}),
    json.dumps(record(a={"type": ["string", "null"]}, b={"type": "array", "items": TAGGED}, c=BOOL)),
    json.dumps(
        {
            "anyOf": [
                closed(x={"type": "array", "items": item}, **{name: item})
                for name, item in (("i", BOOL), ("o", NUMBER))
            ]
        }
    ),
    CARRIED,
]
NOT_KEPT = [
    json.dumps(record(a={"type": "array", "items": STRING, "minItems": 2})),
    json.dumps(record(a={"enum": [1, 12]}, b={"type": "string", "pattern": "ab+"})),
    json.dumps({"anyOf": [{"type": "array", "items": STRING}, {"type": "array", "items": NUMBER}]}),
    json.dumps(record(a={"const": "ü"})),
]
CHARACTERS, BLANKS = '"{}[]:,-0.1e5tfnaeioulkrswx\\', " \n"


@pytest.mark.parametrize("schema", KEPT + NOT_KEPT)
def test_answers_by_place_are_those_of_the_grammar(schema: str) -> None:
    grammar = _compiler().compile_json_schema(schema, any_whitespace=True)
    tables, words, places = Tables(), words_of(schema), words_of_places(schema)
    assert (places is None) == (schema in NOT_KEPT)
    for walk in range(40):
        random, matcher = Random(walk), XGrammarMatcher(xgrammar.GrammarMatcher(grammar))
        used = {word: random.randrange(3) for word in words}
        shared, layout, plain = Guesses(words, lambda _, used=used: used, tables), Layout(), Layout()
        layout.words, layout.source = places, schema
        written = ""
        while len(written) < 160:
            likelihood = random.uniform(0.5, 1.0)
            expected, found = (
                likely(matcher, 300, guesses, own, lambda _, p=likelihood: p, "!")
                for guesses, own in ((Guesses(words, lambda _, used=used: used), plain), (shared, layout))
            )
            assert found == expected, written
            text = "".join(piece.text for piece in found).removesuffix("!")
            if not text or random.random() < 0.4:
                some = CHARACTERS + (BLANKS if walk % 2 else "")
                text = next((one for one in random.sample(some, len(some)) if matcher.allows(one)), "")
            text = text[: random.randint(1, 9)]
            if not text or not matcher.accept_text(text):
                break
            written += text
            layout.follow(text)
            plain.follow(text)


def test_text_that_is_no_json_has_no_places() -> None:
    for written in ("hm ", '{"a": </think>', '"a"', '{"a": "b" "', "{} {"):
        layout = Layout(words=("name",), source="any")
        layout.follow(written + '{"name')
        assert layout.place is None, written

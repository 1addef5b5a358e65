"""Answers that are kept by the place in a text are those of a grammar that is asked anew."""

import json
from random import Random
from typing import Any

import pytest
import xgrammar

from whiflash_sglang.spans.vocabulary import Vocabulary, whole_text
from whiflash_sglang.structure.calls import _compiler, schema_of
from whiflash_sglang.structure.guesses import TEXTS, Ahead, Guesses, Tables, likely
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
TOOLS = [("look_up", record(unit={"enum": ["inch", "inches"]}, tags={"type": "array", "items": STRING})), ("end", None)]
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
    json.dumps(record(a=STRING) | {"$defs": None}),
    json.dumps(record(a=STRING, b={"type": "string", "properties": None}) | {"definitions": []}),
    json.dumps(record(a=STRING) | {"$defs": {"x": {"enum": None}}}),
]
CHARACTERS, BLANKS = '"{}[]:,-0.1e5tfnaeioulkrswx\\', " \n"
WRITTEN = "", "", "x", "12", 'Os lo", ', 'a \\"b", '


@pytest.mark.parametrize("schema", KEPT + NOT_KEPT)
def test_answers_by_place_are_those_of_the_grammar(schema: str) -> None:
    grammar = _compiler().compile_json_schema(schema, any_whitespace=True)
    tables, words, places = Tables(), words_of(schema), words_of_places(schema)
    assert (places is None) == (schema in NOT_KEPT)
    for walk in range(40):
        random, matcher = Random(walk), XGrammarMatcher(xgrammar.GrammarMatcher(grammar))
        used = {word: random.randrange(3) for word in words}
        shared, layout, plain = Guesses(words, used, tables), Layout(), Layout()
        layout.words, layout.source = places, schema
        written = ""
        while len(written) < 160:
            likelihood = random.uniform(0.5, 1.0)
            expected, found = (
                likely(Ahead(matcher, own, guesses), 300, lambda _, p=likelihood: p, "!")
                for guesses, own in ((Guesses(words, used), plain), (shared, layout))
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


@pytest.mark.parametrize("texts", [2, TEXTS])
@pytest.mark.parametrize("schema", KEPT)
def test_tokens_lead_to_the_places_of_their_texts(
    schema: str, texts: int, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that places know asks no matcher, and what is kept has a bound."""
    monkeypatch.setattr("whiflash_sglang.structure.guesses.TEXTS", texts)
    monkeypatch.setattr("whiflash_sglang.structure.guesses.PLACES", 8 * texts)
    grammar = _compiler().compile_json_schema(schema, any_whitespace=True)
    tables, words, asked = Tables(vocabulary), words_of(schema), 0
    for walk in range(40):
        random, matcher = Random(walk % 9), XGrammarMatcher(xgrammar.GrammarMatcher(grammar))
        layout = Layout(words=words_of_places(schema), source=schema)
        shared, anew = (Guesses(words, {}, known) for known in (tables, None))
        for _ in range(12):
            pieces = likely(Ahead(matcher, layout, shared), 99, lambda _: 1.0)
            tokens = vocabulary.encode("".join(piece.text for piece in pieces))[: random.randint(0, 9)]
            tokens += [token for part in random.choice(WRITTEN) for token in vocabulary.encode(part)]
            tokens += random.choices(range(len(vocabulary.token_bytes)), k=random.randint(0, 1))
            own, ahead, taken = layout.copy(), Ahead(matcher, layout, shared), 0
            with matcher.trying():
                assert ahead.accept([]) == 0
                count, known = ahead.accept(tokens), ahead._own is None
                found = likely(ahead, 99, lambda _: 1.0)
            asked += not known
            with matcher.trying():
                while taken < len(tokens) and (text := whole_text(vocabulary, [tokens[taken]])):
                    if not matcher.accept_text(text):
                        break
                    own.follow(text)
                    taken += 1
                assert (count, found) == (taken, likely(Ahead(matcher, own, anew), 99, lambda _: 1.0))
            for token in tokens[:count]:
                layout.follow(text := whole_text(vocabulary, [token]))
                assert matcher.accept_text(text)
            assert all(len(place.then) <= texts for place in shared._own[schema].values())
            assert len(shared._own[schema]) <= 8 * texts
    assert texts == 2 or asked < 240

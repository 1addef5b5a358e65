"""Schemas with what real ones have: no draft that a grammar forbids, whatever its masks let a text become."""

import json
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_grammars import SCHEMAS, Case, Grammars

from whiflash_sglang.spans.vocabulary import Vocabulary, text_of
from whiflash_sglang.structure.guesses import Guesses
from whiflash_sglang.structure.layout import Layout
from whiflash_sglang.structure.schemas import words_of
from whiflash_sglang.structure.sketch import CHARS_PER_TOKEN, TAIL, sketch

WIDTH = 16
"""Tokens of a proposal, as the arm has it."""

FREE = 0.7
"""How often a text goes on with what was proposed, where anything was: else it would hardly leave its first string."""


@dataclass
class Walked:
    """Sums over texts. most_cut: characters that one look gave to the tokenizer; most_looks: times that it did."""

    tokens: int = 0
    proposed: int = 0
    forbidden: int = 0
    moved: int = 0
    most_cut: int = 0
    most_looks: int = 0


class _Counting:
    """A tokenizer whose work of one look is counted."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.calls: list[int] = []
        self._encode = vocabulary.encode
        self.vocabulary = vocabulary._replace(encode=self._counted)

    def _counted(self, text: str) -> Any:
        self.calls.append(len(text))
        return self._encode(text)


def walk_schema(
    grammars: Grammars, vocabulary: Vocabulary, schema: Any, rng: random.Random, tokens: int, done: Walked
) -> None:
    """One text of at most `tokens` tokens; `done` is added to."""
    raw, judge = (grammars.raw(schema, blanks=True) for _ in range(2))
    if grammars.engine == "llguidance":
        assert not raw.is_error()
    counting, layout = _Counting(vocabulary), Layout()
    matcher = grammars.matcher(raw, counting.vocabulary)
    guesses = Guesses(words_of(json.dumps(schema)), lambda text: 0)
    written: list[int] = []
    while len(written) < tokens:
        before = grammars.allowed(raw)
        counting.calls.clear()
        grammar = {"matcher": matcher, "layout": layout, "guesses": guesses, "end": grammars.end}
        found = sketch(counting.vocabulary, written[-TAIL:], WIDTH, **grammar)
        # llguidance takes tokens only, so it is given every text that is tried.
        if grammars.engine == "xgrammar":
            done.most_cut = max(done.most_cut, sum(counting.calls))
            done.most_looks = max(done.most_looks, len(counting.calls))
        done.moved += not np.array_equal(before, grammars.allowed(raw))
        done.proposed += len(found)
        done.forbidden += grammars.forbidden(judge, [token.token for token in found])
        going = found[0].token if found and rng.random() < FREE else _drawn(before, rng)
        if going is None or going == grammars.end:
            break
        layout.follow(text_of(vocabulary, [going]))
        written.append(going)
        for engine in (raw, judge):
            grammars.accept(engine, going)
    done.tokens += len(written)


def _drawn(allowed: Any, rng: random.Random) -> int | None:
    """Any token that may follow; what ends the text only where nothing else may."""
    choices = np.flatnonzero(allowed)
    return int(rng.choice(choices)) if len(choices) else None


ANYTHING: dict[str, Any] = {}
WRITTEN: dict[str, Any] = {
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
            {"type": "object", "properties": {"citys": {"enum": [1, 2.5, None, True]}}, "required": ["citys"]},
            {"type": "array", "prefixItems": [{"type": "null"}, {"type": "number"}], "items": False},
        ]
    },
    "optional": {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in (("city", "string"), ("unit", "integer"))},
        "additionalProperties": False,
    },
    "open": {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": {"type": "number"}},
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


@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_forbidden_nothing_moved_and_bounded_work(
    grammars: Grammars, vocabulary: Vocabulary, name: str
) -> None:
    done, rng = Walked(), random.Random(name)
    for _ in range(4):
        walk_schema(grammars, vocabulary, WRITTEN[name], rng, 40, done)
    check(done, vocabulary)
    assert done.tokens > 4
    assert done.proposed > 0 or name in ("bounds", "anything")


@settings(deadline=None, max_examples=40)
@given(case=SCHEMAS, seed=st.integers(0, 99))
def test_of_any_schema(grammars: Grammars, vocabulary: Vocabulary, case: Case, seed: int) -> None:
    done = Walked()
    walk_schema(grammars, vocabulary, case[0], random.Random(seed), 25, done)
    check(done, vocabulary)


def check(done: Walked, vocabulary: Vocabulary) -> None:
    assert done.forbidden == done.moved == 0
    written = TAIL * max(map(len, vocabulary.token_bytes))
    assert done.most_looks <= 2
    assert done.most_cut <= 2 * (WIDTH * CHARS_PER_TOKEN + written)

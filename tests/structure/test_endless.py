"""Grammars that force text without an end, which xgrammar's own search for it would follow for ever."""

import json
from typing import Any

import pytest
import xgrammar

from whiflash_sglang.spans.vocabulary import Vocabulary
from whiflash_sglang.structure.layout import Layout
from whiflash_sglang.structure.matchers import FORCED_TOKENS, XGrammarMatcher
from whiflash_sglang.structure.schemas import MOST_PLAIN_CHARS, is_plain
from whiflash_sglang.structure.sketch import sketch

ITSELF = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}
DOUBLED = "\n".join([f"r{i} ::= r{i + 1} r{i + 1}" for i in range(24)])

ENDLESS = {
    "a rule behind itself": 'root ::= "ab" root',
    "a choice that is none": 'root ::= "ab" root | "ab" root',
    "24 times doubled": f'root ::= r0\n{DOUBLED}\nr24 ::= "ab"\n',
    "a schema that requires itself": ITSELF,
    "a long value": {"const": "ab" * 10_000},
}


class Watched:
    """An engine's matcher whose own search for forced text nobody may ask for."""

    def __init__(self, raw: Any) -> None:
        self._raw, self.masks = raw, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def find_jump_forward_string(self) -> str:
        raise AssertionError("it would not come back")

    def fill_next_token_bitmask(self, mask: Any) -> bool:
        self.masks += 1
        return bool(self._raw.fill_next_token_bitmask(mask))


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> xgrammar.GrammarCompiler:
    size, end = len(tokenizer), tokenizer.eos_token_id
    return xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size, stop_token_ids=[end])
    )


def watched(compiler: xgrammar.GrammarCompiler, grammar: Any) -> Watched:
    if isinstance(grammar, str):
        compiled = compiler.compile_grammar(grammar)
    else:
        compiled = compiler.compile_json_schema(json.dumps(grammar), any_whitespace=False)
    return Watched(xgrammar.GrammarMatcher(compiled))


@pytest.mark.parametrize("grammar", ENDLESS.values(), ids=ENDLESS)
def test_a_grammar_without_a_choice_is_followed_so_far_and_no_further(
    compiler: xgrammar.GrammarCompiler, tokenizer: Any, vocabulary: Vocabulary, grammar: Any
) -> None:
    raw = watched(compiler, grammar)
    matcher = XGrammarMatcher(raw, vocabulary, len(tokenizer))
    forced = matcher.forced()
    assert len(forced) >= 64
    assert raw.masks == FORCED_TOKENS
    with matcher.trying():
        assert matcher.accept_text(forced)
    assert matcher.forced() == forced, "nothing of it is left behind"
    assert len(sketch(vocabulary, (), 16, matcher=matcher, layout=Layout())) == 16


@pytest.mark.parametrize("masks", [0, 1, FORCED_TOKENS - 1])
def test_a_search_that_has_no_time_left_is_not_handed_to_the_engine(
    compiler: xgrammar.GrammarCompiler, tokenizer: Any, vocabulary: Vocabulary, masks: int
) -> None:
    """Whether the text has an end is not known then, and `Watched` raises."""
    raw = watched(compiler, ITSELF)
    matcher = XGrammarMatcher(raw, vocabulary, len(tokenizer))
    matcher.exhausted = lambda: raw.masks >= masks
    assert matcher.forced() == ""
    assert raw.masks == masks
    assert not matcher.accept_token(vocabulary.encode("{")[0])
    assert not matcher.accept_text("{")
    matcher.exhausted = lambda: False
    assert matcher.accept_text("{")


PLAIN = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", 3]}, "tags": {"type": ["array", "null"], "minItems": 1}},
    "required": ["city"],
}


def tag(content: dict[str, Any]) -> dict[str, Any]:
    form = {"type": "tag", "begin": "<f>", "content": content, "end": "</f>"}
    return {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<"], "tags": [form]}}


@pytest.mark.parametrize(
    "schema", [PLAIN, {"anyOf": [PLAIN, True]}, tag({"type": "json_schema", "json_schema": PLAIN})]
)
def test_of_what_is_plain_the_engine_searches_by_itself(schema: dict[str, Any]) -> None:
    assert is_plain(json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        ITSELF,
        {"type": "string", "pattern": "a{100000}"},
        {"type": "array", "items": {"const": 1}, "minItems": 10**6},
        {"anyOf": [{"patternProperties": {"a{100000}": {}}}]},
        {"const": "a" * MOST_PLAIN_CHARS},
        tag({"type": "grammar", "grammar": 'root ::= "a" root'}),
        tag({"type": "regex", "pattern": "a{100000}"}),
        tag({"type": "repeat", "min": 10**6, "content": {"type": "const_string", "value": "a"}}),
        tag({"type": "json_schema", "json_schema": ITSELF}),
        {"type": {"type": "object"}},
        [],
    ],
)
def test_of_nothing_else(schema: Any) -> None:
    assert not is_plain(json.dumps(schema))
    assert not is_plain("")
    assert not is_plain("{")

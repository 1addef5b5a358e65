"""What grammars force, of schemas that nobody chose: never a token that they forbid, and always what was written."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from whiflash_sglang.lookup.forced import CHARS_PER_TOKEN, forced_tokens
from whiflash_sglang.spans.vocabulary import token_bytes
from whiflash_sglang.train.grammar import GrammarMasks, GrammarSpec

NAMES = ("city", "unit", "user_id", "flight number", "größe", 'a "quoted" key')


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE with merges across punctuation, learned from JSON."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [
        json.dumps({name: value, name + "s": [value]}) for name in NAMES for value in ("Paris", 3, True, None)
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    backend.train_from_iterator(texts * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="module")
def masks(tokenizer: PreTrainedTokenizerFast) -> GrammarMasks:
    return GrammarMasks(tokenizer, len(tokenizer), tokenizer.eos_token_id)


Encode = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def encode(tokenizer: PreTrainedTokenizerFast) -> Encode:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


Case = tuple[dict[str, Any], Any]
"""A schema and a value that fits it."""


def leaf() -> st.SearchStrategy[Case]:
    words = st.sampled_from(["Paris", "a b", 'say "x"', "ü", ""])
    return st.one_of(
        words.map(lambda word: ({"type": "string"}, word)),
        st.integers(-99, 99).map(lambda number: ({"type": "integer"}, number)),
        st.booleans().map(lambda value: ({"type": "boolean"}, value)),
        st.lists(words, min_size=1, max_size=3, unique=True).map(lambda many: ({"enum": many}, many[-1])),
        words.map(lambda word: ({"const": word}, word)),
    )


def nested(inner: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    def to_object(parts: dict[str, Case]) -> Case:
        properties = {name: schema for name, (schema, _) in parts.items()}
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        return schema, {name: value for name, (_, value) in parts.items()}

    def to_list(case: Case) -> Case:
        return {"type": "array", "items": case[0], "minItems": 1, "maxItems": 2}, [case[1]]

    objects = st.dictionaries(st.sampled_from(NAMES), inner, min_size=1, max_size=3).map(to_object)
    return objects | inner.map(to_list)


SCHEMAS = st.recursive(leaf(), nested, max_leaves=5)


@settings(deadline=None, max_examples=150)
@given(case=SCHEMAS, limit=st.integers(0, 12))
def test_what_is_forced_is_allowed_and_is_what_follows(
    tokenizer: PreTrainedTokenizerFast, masks: GrammarMasks, encode: Encode, case: Case, limit: int
) -> None:
    """Along a document that fits the schema, at each of its tokens."""
    schema, value = case
    spec = GrammarSpec("json", json.dumps(schema))
    matcher, other = masks.matcher(spec), masks.matcher(spec)
    tokens, table = encode(json.dumps(value, ensure_ascii=False)), token_bytes(tokenizer)
    for done in range(len(tokens)):
        forced = forced_tokens(matcher, encode, limit)
        assert len(forced) <= limit
        for token in forced:
            assert other.accept_token(token), "a draft that the grammar forbids"
        other.rollback(len(forced))
        rest = b"".join(table[token] for token in tokens[done:])
        written = b"".join(table[token] for token in forced)
        assert rest.startswith(written) or written.startswith(rest), (rest, written)
        assert matcher.accept_token(tokens[done])
        assert other.accept_token(tokens[done])


KEYS = {
    "type": "object",
    "properties": {"city": {"const": "Paris"}, "unit": {"enum": ["celsius", "kelvin"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}


def compact(tokenizer: PreTrainedTokenizerFast, schema: dict[str, Any]) -> xgrammar.GrammarMatcher:
    """A grammar without a choice of blanks."""
    info = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=len(tokenizer), stop_token_ids=[tokenizer.eos_token_id]
    )
    compiler = xgrammar.GrammarCompiler(info)
    return xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema), any_whitespace=False))


def test_a_whole_skeleton_in_canonical_tokens(tokenizer: PreTrainedTokenizerFast, encode: Encode) -> None:
    matcher = compact(tokenizer, KEYS)
    forced = forced_tokens(matcher, encode, 64)
    assert tokenizer.decode(forced) == '{"city": "Paris", "unit": "'
    assert forced == encode('{"city": "Paris", "unit": "')
    for token in [*forced, *encode("k")]:
        assert matcher.accept_token(token)
    assert tokenizer.decode(forced_tokens(matcher, encode, 64)) == 'elvin"}'


def test_nothing_where_there_is_a_choice_or_the_end(
    tokenizer: PreTrainedTokenizerFast, encode: Encode
) -> None:
    matcher = compact(tokenizer, {"enum": ["a", "b"]})
    assert matcher.accept_token(encode('"')[0])
    assert forced_tokens(matcher, encode, 8) == []
    assert forced_tokens(matcher, encode, 0) == []
    for token in [*encode("a"), *encode('"'), tokenizer.eos_token_id]:
        assert matcher.accept_token(token)
    assert matcher.is_terminated()
    assert forced_tokens(matcher, encode, 8) == []


def test_a_tokenizer_that_writes_the_text_otherwise_proposes_nothing(
    tokenizer: PreTrainedTokenizerFast, encode: Encode
) -> None:
    """As SentencePiece's, which sets a blank before every text."""
    matcher = compact(tokenizer, KEYS)
    assert forced_tokens(matcher, lambda text: encode(" " + text), 8) == []
    assert len(forced_tokens(matcher, encode, 8)) == 8, "and leaves the matcher as it was"


def test_work_is_bounded(tokenizer: PreTrainedTokenizerFast, encode: Encode) -> None:
    matcher = compact(tokenizer, {"const": "Paris " * 400})
    seen: list[int] = []

    def counted(text: str) -> list[int]:
        seen.append(len(text))
        return encode(text)

    for limit in (1, 7, 64):
        forced = forced_tokens(matcher, counted, limit)
        assert len(forced) == limit
    assert seen == [limit * CHARS_PER_TOKEN for limit in (1, 7, 64)]

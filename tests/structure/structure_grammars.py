"""Grammars of both engines over one tokenizer, and documents that fit schemas which nobody chose."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import llguidance
import numpy as np
import torch
import xgrammar
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from whiflash_sglang.spans.vocabulary import Vocabulary
from whiflash_sglang.structure.matchers import GuidanceMatcher, Matcher, XGrammarMatcher

NAMES = ("city", "unit", "user_id", "flight number", "größe", 'a "quoted" key')

KEYS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"const": "Paris"}, "unit": {"enum": ["celsius", "kelvin"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}

PROMPT = [5, 6, 7]

Case = tuple[dict[str, Any], Any]
"""A schema and a value that fits it."""


def small_tokenizer(words: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges across punctuation, learned from JSON. words: parts texts; None: as GPT-2 does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = words or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [json.dumps({name: value, name + "s": [value]}) for name in NAMES for value in ("Paris", 3, True, None)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    backend.train_from_iterator(texts * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


class Grammars:
    """Matchers of one engine for JSON schemas, as SGLang compiles them."""

    def __init__(self, engine: str, tokenizer: PreTrainedTokenizerFast, guidance: llguidance.LLTokenizer) -> None:
        self.engine, self.size, self.end = engine, len(tokenizer), tokenizer.eos_token_id
        self._guidance = guidance
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=self.size, stop_token_ids=[self.end])
        self._compiler = xgrammar.GrammarCompiler(info)

    def raw(self, schema: dict[str, Any], *, blanks: bool) -> Any:
        """The engine's own matcher. blanks: whitespace is free, as SGLang's default has it."""
        text = json.dumps(schema)
        if schema.get("type") == "structural_tag":
            return self._tagged(schema)
        if self.engine == "xgrammar":
            return xgrammar.GrammarMatcher(
                self._compiler.compile_json_schema(text, any_whitespace=blanks), max_rollback_tokens=200
            )
        grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": blanks})
        return llguidance.LLMatcher(self._guidance, grammar)

    def _tagged(self, tag: dict[str, Any]) -> Any:
        parts = [(each["begin"], json.dumps(each["schema"]), each["end"]) for each in tag["structures"]]
        if self.engine == "xgrammar":
            tags = [xgrammar.StructuralTagItem(begin=begin, schema=schema, end=end) for begin, schema, end in parts]
            return xgrammar.GrammarMatcher(
                self._compiler.compile_structural_tag(tags, tag["triggers"]), max_rollback_tokens=200
            )
        (trigger,) = tag["triggers"]
        ours = [
            llguidance.StructTag(trigger=trigger, begin=begin, grammar=schema, end=end) for begin, schema, end in parts
        ]
        return llguidance.LLMatcher(self._guidance, llguidance.StructTag.to_grammar(ours))

    def matcher(self, raw: Any, vocabulary: Vocabulary) -> Matcher:
        """As the arm sees it."""
        if self.engine == "xgrammar":
            return XGrammarMatcher(raw, vocabulary, self.size)
        return GuidanceMatcher(raw, vocabulary.encode)

    def allowed(self, raw: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[V] bool: the engine's own mask of what may follow."""
        if self.engine == "xgrammar":
            mask = torch.full((1, (self.size + 31) // 32), -1, dtype=torch.int32)
            raw.fill_next_token_bitmask(mask)
            data = mask.numpy().tobytes()
        else:
            data = raw.compute_bitmask()
        return np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")[: self.size].astype(bool)

    def accept(self, raw: Any, token: int) -> None:
        """Move the engine's own matcher."""
        assert raw.accept_token(token) if self.engine == "xgrammar" else raw.consume_token(token)

    def forbidden(self, raw: Any, tokens: Sequence[int]) -> int:
        """How many of the tokens the engine's own masks do not allow, one behind the other; `raw` stays as it was."""
        steps = refused = 0
        for number, token in enumerate(tokens):
            if not self.allowed(raw)[token]:
                refused = len(tokens) - number
            if refused or token == self.end:
                break
            self.accept(raw, token)
            steps += 1
        if steps:
            raw.rollback(steps)
        return refused


class Told:
    """A request's grammar, which its scheduler tells every token."""

    end: int | None = None
    begins: int | None = len(PROMPT)

    def __init__(self, grammars: Grammars, schema: dict[str, Any] | None = None) -> None:
        self._new = partial(grammars.raw, schema or KEYS, blanks=schema is not None)
        self._raw, self._grammars = self._new(), grammars
        self.schema = json.dumps(schema) if schema else ""
        self.text = list(PROMPT)

    def tell(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._grammars.accept(self._raw, token)
        self.text += tokens

    def beginning(self, vocabulary: Vocabulary) -> Matcher:
        return self._grammars.matcher(self._new(), vocabulary)

    def history(self, start: int) -> Sequence[int]:
        return self.text[start:]


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

    return st.dictionaries(st.sampled_from(NAMES), inner, min_size=1, max_size=3).map(to_object) | inner.map(to_list)


SCHEMAS = st.recursive(leaf(), nested, max_leaves=5)

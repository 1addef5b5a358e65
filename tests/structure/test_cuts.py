"""The cut of a text depends on its open word only."""

import json
from random import Random

import pytest
from structure_grammars import NAMES, small_tokenizer
from tokenizers import Regex, pre_tokenizers

from whiflash_sglang.spans.vocabulary import text_of, vocabulary_of
from whiflash_sglang.structure.chances import Kind, LikelyText
from whiflash_sglang.structure.sketch import TAIL, cut, open_word

LETTERS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
"""Words of Llama 3, and in essence of Qwen: a mark may begin one, and a line may end with marks."""


@pytest.mark.parametrize("words", [None, LETTERS], ids=["gpt2", "llama3"])
def test_the_word_that_is_open_is_all_that_a_cut_depends_on(words: str | None) -> None:
    """As of the whole tail, in whatever tokens that was written."""
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    vocabulary = vocabulary_of(small_tokenizer(pre_tokenizers.Sequence([*split, bytewise])))
    random, shorter = Random(0), 0
    for _ in range(3000):
        value = "".join(random.choices("aB3'_-. /é世<|>\n", k=random.randint(0, 9)))
        text = json.dumps({random.choice(NAMES): value, "unit": 12345}, ensure_ascii=random.random() < 0.5)
        tokens = vocabulary.encode(text + random.choice(("\n</tag>\n", "<|end|>")))
        if random.random() < 0.3:  # not as the tokenizer cuts it
            tokens = [token for part in text for token in vocabulary.encode(part)]
        at = random.randrange(len(tokens))
        tail, rest = tokens[max(at - TAIL, 0) : at], text_of(vocabulary, tokens[at:])
        if rest and (shorter_tail := open_word(vocabulary, tail)) != tail:
            pieces, shorter = [LikelyText(rest, Kind.USUAL)], shorter + 1
            assert cut(vocabulary, shorter_tail, pieces) == cut(vocabulary, tail, pieces), (text, tail)
    assert shorter > 1000


def test_tokens_that_only_the_tokenizer_has_are_no_drafts() -> None:
    """Those of an image, say, in a marker of a client's hints: the target's embedding ends before them."""
    vocabulary = vocabulary_of(small_tokenizer())
    pieces = [LikelyText(NAMES[0] + "\n" + NAMES[1], Kind.USUAL)]
    tokens = [each.token for each in cut(vocabulary, (), pieces)]
    size = max(tokens)
    assert [each.token for each in cut(vocabulary._replace(size=size), (), pieces)] == tokens[: tokens.index(size)]

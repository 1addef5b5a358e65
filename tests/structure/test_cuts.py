"""Text is cut as its target cut it before, where it was not free to choose."""

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_grammars import NAMES, small_tokenizer
from tokenizers import Regex, pre_tokenizers

from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, text_of, vocabulary_of
from whiflash_sglang.structure.chances import KEPT, MOST, Cuts, Kind, LikelyText
from whiflash_sglang.structure.sketch import TAIL, _open_word, _reasons, cut


def test_a_place_is_cut_as_it_was_when_it_was_seen_last(vocabulary: Vocabulary) -> None:
    usual = vocabulary.encode('{"city": "Paris"')
    name, marks = usual[1], usual[2]
    assert bytes_of(vocabulary, [marks]) == b'":', "what the tokenizer has there"
    (quote,) = vocabulary.encode('"')
    cuts = Cuts()
    cuts.learn(name, marks, quote)
    found = cuts.applied(vocabulary, -1, usual)
    tokens = [token for token, _ in found]
    assert tokens[:3] == [*usual[:2], quote]
    assert bytes_of(vocabulary, tokens) == bytes_of(vocabulary, usual)
    assert [before for token, before in found if token != before] == [marks]
    assert cuts.applied(vocabulary, name, usual[2:])[0][0] == quote
    assert [token for token, _ in cuts.applied(vocabulary, name, usual)] != tokens[1:]
    cuts.learn(name, marks, marks)
    assert [token for token, _ in cuts.applied(vocabulary, -1, usual)] == usual


def test_a_sketch_says_what_it_put_in_the_place_of_what(vocabulary: Vocabulary) -> None:
    text = '"city": "Paris"'
    first, *_ = vocabulary.encode(text)
    cuts = Cuts()
    cuts.learn(-1, first, vocabulary.encode('"')[0])
    found = cut(vocabulary, [], [LikelyText(text, Kind.FORCED)], lambda kind: 1.0, cuts, 99)
    if bytes_of(vocabulary, [first]) != b'"':
        assert found[0].usual == first
    assert {token.usual for token in found[1:]} == {None}


def test_what_is_remembered_and_cut_anew_is_bounded(vocabulary: Vocabulary) -> None:
    cuts, asked = Cuts(), list[str]()
    for number in range(KEPT + 9):
        cuts.learn(number, 1, 2)
    assert len(cuts._written) == KEPT

    def encode(text: str) -> list[int]:
        asked.append(text)
        return vocabulary.encode(text)

    ab, a, b = (vocabulary.encode(text)[0] for text in ("Paris", "P", "a"))
    cuts.learn(ab, ab, a)
    for before in range(len(vocabulary.token_bytes)):
        cuts.learn(before, ab, a)
    cuts.applied(vocabulary._replace(encode=encode), b, [ab] * 50)
    assert len(asked) <= MOST


def test_a_cut_text_is_found_by_its_tenant_only(vocabulary: Vocabulary) -> None:
    """Elsewhere the time of a look would show whether another tenant's text ended so."""
    cuts, pieces = Cuts(), [LikelyText('{"a": ', Kind.FORCED)]
    for tenant in (None, b"one", b"two", b"one", None):
        cut(vocabulary, [1], pieces, lambda _: 1.0, cuts.of(tenant), 9)
    assert len(cuts.reasons) == 3


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), st.integers(0, 400))), st.text(max_size=40))
def test_text_is_never_changed(vocabulary: Vocabulary, learned: list[tuple[int, int, int]], text: str) -> None:
    cuts, tokens = Cuts(), vocabulary.encode(text)
    for one in learned:
        cuts.learn(*one)
    for before, usual in zip([-1, *tokens], tokens, strict=False):
        cuts.learn(before, usual, vocabulary.encode(text[:1])[0])
    found = cuts.applied(vocabulary, -1, tokens)
    assert bytes_of(vocabulary, [token for token, _ in found]) == bytes_of(vocabulary, tokens)


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
        if rest and (open_word := _open_word(vocabulary, tail)) != tail:
            pieces, shorter = [LikelyText(rest, Kind.USUAL)], shorter + 1
            expected = _reasons(vocabulary, tail, pieces, Cuts())
            assert _reasons(vocabulary, open_word, pieces, Cuts()) == expected, (text, text_of(vocabulary, tail))
    assert shorter > 1000

"""Token bytes from real tokenizers, built here: the bytes of an encoding are the bytes of the text."""

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from whiflash_sglang.spans.vocabulary import token_bytes

CORPUS = ['The tool call is {"name": "search", "arguments": {"q": "été à Zürich"}}\n'] * 20
TEXTS = [
    "plain",
    " leading space",
    "tabs\tand\nnewlines",
    "été 🙂 数字",
    '<tool_call>\n{"a": 1}\n</tool_call>',
    "\x00\x7f\xad",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool_call>"), AddedToken("Ġé", normalized=False)])
    return tokenizer


def sentencepiece_style() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special[:2]))
    vocabulary = tokenizer.get_vocab()
    for token in special[2:]:
        vocabulary.setdefault(token, len(vocabulary))
    rebuilt = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    rebuilt.pre_tokenizer = tokenizer.pre_tokenizer
    rebuilt.add_special_tokens(["</s>"])
    return rebuilt


@pytest.mark.parametrize("build", [byte_level, sentencepiece_style])
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_an_encoding_are_the_bytes_of_the_text(build: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = build()
    table = token_bytes(tokenizer)
    assert b"".join(table[i] for i in tokenizer.encode(text, add_special_tokens=False).ids) == text.encode()


def test_the_wrapped_tokenizer_gives_the_same_table() -> None:
    tokenizer = byte_level()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == token_bytes(tokenizer)


def test_added_tokens_stand_for_their_text() -> None:
    tokenizer = byte_level()
    table = token_bytes(tokenizer)
    assert table[tokenizer.token_to_id("<|im_end|>")] == b"<|im_end|>"
    assert table[tokenizer.token_to_id("Ġé")] == "Ġé".encode()


def test_a_tokenizer_without_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="shows no vocabulary"):
        token_bytes(object())  # type: ignore[arg-type]

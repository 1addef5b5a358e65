"""Vocabularies: the bytes of each token id, read from a tokenizer, and texts of tokens.

Markers cannot be followed in detokenised text: a token may hold half a character, and decoders
trim and join. Three vocabularies cover the models in use:

- byte-level BPE (GPT-2, SmolLM2, Qwen, Llama 3): each character of a token names one byte, by GPT-2's
  table of printable stand-ins (Radford et al. 2019, "Language Models are Unsupervised Multitask
  Learners"; a space is written U+0120);
- SentencePiece style (Llama 2, Mistral, Gemma): a space is written U+2581, bytes outside the
  vocabulary `<0x0A>`;
- anything else: the token is its text.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_BYTE_LEVEL_SPACE = "\u0120"
_SENTENCEPIECE_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary(NamedTuple):
    """A target's vocabulary. encode: text → token ids, without special tokens added. token_bytes: bytes of every id.
    special: ids of special tokens, such as those between messages. size: number of ids that the target embeds; a
    tokenizer may have more.
    """

    encode: Callable[[str], list[int]]
    token_bytes: Sequence[bytes]
    special: frozenset[int]
    size: float = math.inf


def bytes_of(vocabulary: Vocabulary, tokens: Sequence[int]) -> bytes:
    """Return the bytes of the tokens' text; ids outside the vocabulary have none."""
    table = vocabulary.token_bytes
    size = len(table)
    return b"".join([table[token] for token in tokens if 0 <= token < size])


def is_text(vocabulary: Vocabulary, token: int) -> bool:
    """Whether a token has text and is not special. Grammars need such tokens: xgrammar logs a warning about others."""
    table = vocabulary.token_bytes
    return 0 <= token < len(table) and bool(table[token]) and token not in vocabulary.special


def text_of(vocabulary: Vocabulary, tokens: Sequence[int]) -> str:
    """Return the tokens' text from the first whole character; empty if the rest is not UTF-8, such as a cut end."""
    data = bytes_of(vocabulary, tokens)
    begin = 0
    while begin < len(data) and data[begin] & 0xC0 == 0x80:
        begin += 1
    try:
        return data[begin:].decode()
    except UnicodeDecodeError:
        return ""


def cut_behind(vocabulary: Vocabulary, written: str, text: str) -> list[int] | None:
    """Tokenize `written + text`; return the tokens of `text`, or None if no token begins where `text` does."""
    tokens, table = vocabulary.encode(written + text), vocabulary.token_bytes
    data, whole = b"".join(table[token] for token in tokens), (written + text).encode()
    if data not in (whole, b" " + whole):  # SentencePiece sets a blank before a text
        return None
    left = len(written.encode()) + len(data) - len(whole)
    for number, token in enumerate(tokens):
        if left == 0:
            return list(tokens[number:])
        left -= len(table[token])
        if left < 0:
            return None
    return []


def vocabulary_of(tokenizer: Any, size: float = math.inf) -> Vocabulary:
    """Build the `Vocabulary` of a `transformers` tokenizer and a target of `size` ids.

    Raises: ValueError if the tokenizer shows no vocabulary (`token_bytes`).
    """
    # All tokens added as special, since `all_special_ids` has only those with a role (end, pad).
    special = {index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    fast = getattr(tokenizer, "backend_tokenizer", None)

    def encode(text: str) -> list[int]:
        if fast is not None:  # the checks of the class around it take longer than a short text
            return list(fast.encode(text, add_special_tokens=False).ids)
        return list(tokenizer.encode(text, add_special_tokens=False))

    return Vocabulary(encode, token_bytes(tokenizer), frozenset(special | set(tokenizer.all_special_ids)), size)


def token_bytes(tokenizer: Any) -> tuple[bytes, ...]:
    """Return the bytes of every token id; empty for ids that the vocabulary skips.

    tokenizer: a `transformers` tokenizer or a `tokenizers.Tokenizer`.

    Raises: ValueError if the tokenizer shows no vocabulary.
    """
    vocabulary: Mapping[str, int] = getattr(tokenizer, "get_vocab", dict)()
    if not vocabulary:
        raise ValueError(f"{type(tokenizer).__name__} shows no vocabulary: span tracking needs one")
    # Tokens added after training, special ones too, are their text.
    listed = getattr(tokenizer, "added_tokens_decoder", None) or getattr(tokenizer, "get_added_tokens_decoder", dict)()
    added = frozenset(map(str, listed.values()))
    byte_level = sum(token.startswith(_BYTE_LEVEL_SPACE) for token in vocabulary)
    sentencepiece = sum(token.startswith(_SENTENCEPIECE_SPACE) for token in vocabulary)
    decode = _byte_level if byte_level > sentencepiece else _sentencepiece if sentencepiece else str.encode
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        table[index] = token.encode() if token in added else decode(token)
    return tuple(table)


def _byte_stand_ins() -> dict[str, int]:
    """Return GPT-2's table, character → byte: printable Latin-1 maps to itself, other bytes are U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_STAND_INS = _byte_stand_ins()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_STAND_INS[character] for character in token)
    except KeyError:  # no stand-in, so the token is not byte-level: its bytes are its text
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes((int(match[1], 16),))
    return token.replace(_SENTENCEPIECE_SPACE, " ").encode()

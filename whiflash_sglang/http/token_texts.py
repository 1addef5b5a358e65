"""Texts of tokens one by one, as SGLang's detokenizer would send them if each came alone."""

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.detokenizer_manager import DetokenizerManager

MARK, PLAIN, WORD = range(3)
"""Kinds of texts: with a character that may end a marker of SGLang's parsers; without one; a word without one."""
_PLAIN = re.compile(r"( ?\w)?[\w\s.,;:!?’–—…()/\\=*+#@$%&~^-]*")
_PART = "\ufffd"
"""Last character of a text that ends inside a character."""


class Texts(dict[int, tuple[str, int]]):
    """Token → its text in the middle of an answer, and the text's kind. Filled as tokens come, for all requests.

    flags: whether special tokens are skipped, and whether spaces are set between them.
    """

    def __init__(self, tokenizer: Any, *flags: bool) -> None:
        self._decoder, self._flags = SimpleNamespace(tokenizer=tokenizer), [[flag] for flag in flags]
        self._size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
        self._before = list(tokenizer.encode("a"))  # some tokenizers drop the blank before a text's first word
        self._skipped = 0
        self._skipped = len(self.of([]))

    def __missing__(self, token: int) -> tuple[str, int]:
        text = self.of([token])
        plain = _PLAIN.fullmatch(text)
        self[token] = found = text, MARK if plain is None or not text else WORD if plain[1] else PLAIN
        return found

    def of(self, tokens: Sequence[int]) -> str:
        """Return the text of successive tokens."""
        ids = DetokenizerManager._clamp_decode_ids([*self._before, *tokens], self._size)
        (text,) = DetokenizerManager._grouped_batch_decode(self._decoder, [ids], *self._flags)
        return str(text[self._skipped :])


class Decoder:
    """Decodes one answer. begun: text of the last tokens if it ends inside a character, else empty."""

    def __init__(self, texts: Texts) -> None:
        self._texts, self._open, self.begun = texts, list[int](), ""

    def take(self, token: int) -> tuple[str, int]:
        """Return the text that the next token completes, empty inside a character, and its kind."""
        known = self._texts[token]
        if self._open or known[0].endswith(_PART):
            self._open.append(token)
            text = self._texts.of(self._open)
            if text.endswith(_PART):
                self.begun = text
                return "", MARK
            self._open, self.begun = [], ""
            return text, MARK
        return known


def decoder_of(manager: Any, parameters: Mapping[str, Any]) -> Decoder:
    """Return a decoder of an answer. manager: SGLang's TokenizerManager. parameters: of sampling."""
    flags = tuple(parameters.get(f"{name}_special_tokens") is not False for name in ("skip", "spaces_between"))
    known: dict[Any, Texts] = vars(manager).setdefault("_whiflash_texts", {})
    if flags not in known:
        known[flags] = Texts(manager.tokenizer, *flags)
    return Decoder(known[flags])

"""How a target cuts text that it was not free to choose, learned while serving, of every tenant by itself.

A tokenizer cuts `":"get` one way; a target that would have written a blank there, and must not, cuts it another way,
and does so every time.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, cut_behind

KEPT = 512
"""Places that are remembered; the one that was seen least recently goes first."""

MOST = 4
"""Places of one text that are cut otherwise: behind each of them the rest is cut anew."""


class Cut(NamedTuple):
    """token: at a place of a text. usual: the one that its tokenizer has there."""

    token: int
    usual: int


class Cuts:
    """By the token before a place and the usual one at it: the one that was written instead, when it was seen last."""

    def __init__(self) -> None:
        self._written: OrderedDict[tuple[int, int], int] = OrderedDict()

    def learn(self, before: int, usual: int, written: int) -> None:
        """Behind `before`, where the tokenizer has `usual`, the same text was begun with `written`."""
        self._written.pop((before, usual), None)
        if written != usual:
            self._written[before, usual] = written
        if len(self._written) > KEPT:
            self._written.popitem(last=False)

    def applied(self, vocabulary: Vocabulary, before: int, tokens: Sequence[int]) -> list[Cut]:
        """The text of `tokens`, which follow `before`, as it was cut when it was seen last."""
        found: list[Cut] = []
        rest, left = list(tokens), MOST if self._written else 0
        while rest:
            usual = rest.pop(0)
            written = self._written.get((before, usual)) if left else None
            if written is not None and (anew := _cut_anew(vocabulary, written, [usual, *rest])) is not None:
                rest, left = anew, left - 1
            else:
                written = usual
            found.append(Cut(written, usual))
            before = written
        return found


def _cut_anew(vocabulary: Vocabulary, first: int, tokens: Sequence[int]) -> list[int] | None:
    """The text of `tokens` behind its first token `first`; None where it does not begin with that."""
    text, begin = bytes_of(vocabulary, tokens), bytes_of(vocabulary, [first])
    if not begin or not text.startswith(begin):
        return None
    try:
        return cut_behind(vocabulary, "", text[len(begin) :].decode())
    except UnicodeDecodeError:
        return None

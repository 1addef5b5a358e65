"""Texts to copy from, in the memory of compiled code: a request's own, an answer of another, a predicted answer.

Hash chains over one and two tokens find where a text's end occurred earlier, as in LZ77. A search follows 32 links of a
chain, keeps 8 places and compares 32 tokens at each, whatever the text. Memory is three flat arrays and two tables of
heads: 20 to 36 bytes a token.
"""

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from whiflash_kernels.cpu.compiler import Native

from whiflash_sglang.copying.calibration import MatchCalibration, RequestCalibration

GAP = -1
"""Id between texts; no token has it. Ids below it are positions of images (`core.readable`)."""


class Text(Native):
    """A text that is extended at its end only."""

    def __init__(self, library: ctypes.CDLL, tokens: Iterable[int] = ()) -> None:
        super().__init__(library, "text")
        self.extend(tokens)

    def __len__(self) -> int:
        return int(self.size())

    @property
    def nbytes(self) -> int:
        """Return the bytes of its tokens and chains, their reserve included."""
        return int(self.bytes())

    @property
    def tokens(self) -> "array[int]":
        """Return a copy of its tokens."""
        found = array("i", bytes(4 * len(self)))
        self.library.whiflash_tokens(self.at, found.buffer_info()[0])
        return found

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens, in constant time each, averaged over the doublings of the tables."""
        ids = array("i", iter(tokens))  # an array of another type is only taken as an iterator
        self.append(*ids.buffer_info())


class Source(NamedTuple):
    """A text to copy from. judge: chances of copies from it. habit: how often the first token of copies was right."""

    text: Text
    judge: MatchCalibration
    habit: RequestCalibration


class Prediction(Native):
    """The answer that a request's caller predicts (OpenAI's predicted outputs).

    An answer follows its prediction token by token. Once it differs, the place at which it comes back is searched: the
    longest match with the answer's end, and of equals the nearest one ahead of where it left.

    Args:
        tokens: the predicted answer's. prompt: number of tokens that `follow` is given before the answer's.
            judge: chances of this request's copies from it: how right a caller is says nothing of other copies.
    """

    def __init__(
        self, library: ctypes.CDLL, tokens: Sequence[int], prompt: int = 0, judge: MatchCalibration | None = None
    ) -> None:
        ids, self.judge = array("i", tokens), judge or MatchCalibration()
        super().__init__(library, "prediction", *ids.buffer_info(), prompt)
        self._size = len(ids)

    @property
    def appeared(self) -> tuple[int, int]:
        """Return how many predicted tokens the answer had where they were expected, each counted once, and how many it
        had not.
        """
        right = int(self.accepted())
        return right, self._size - right

    def follow(self, tokens: Sequence[int]) -> None:
        """Compare the prediction with the text's next tokens, with bounded work for each."""
        ids = array("i", tokens)
        self.library.whiflash_follow(self.at, *ids.buffer_info())

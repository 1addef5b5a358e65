"""Texts to copy from, indexed for the compiled search: a request's own, an answer of another, a predicted answer.

Hash chains over one and two tokens find where a text's end occurred earlier, as in LZ77. A search follows 32 links of a
chain, keeps 8 places and compares 32 tokens at each, whatever the text. Memory is three flat arrays and two tables of
heads: 20 to 36 bytes a token.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from whiflash_sglang.copying.calibration import MatchCalibration, RequestCalibration

if TYPE_CHECKING:
    from whiflash_kernels.cpu.copies import CompiledCopies

MAX_MATCH = 32
"""Longest match that is measured: a longer one counts as this long."""

GAP = -1
"""Id between texts; no token has it. Ids below it are positions of images (`core.readable`)."""

BEGINNING = 6
"""Match length of a prediction's beginning while nothing is written yet that could match."""


class Text:
    """A text that is extended at its end only, in the memory of compiled code."""

    def __init__(self, compiled: "CompiledCopies", tokens: Iterable[int] = ()) -> None:
        self.native, self._size = compiled.text(), 0
        self.extend(tokens)

    def __len__(self) -> int:
        return self._size

    @property
    def nbytes(self) -> int:
        """Return the bytes of its tokens and chains, their reserve included."""
        return int(self.native.bytes())

    @property
    def tokens(self) -> "array[int]":
        """Return a copy of its tokens."""
        found = array("i", bytes(4 * self._size))
        self.native.tokens(found.buffer_info()[0])
        return found

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens, in constant time each, averaged over the doublings of the tables."""
        ids = array("i", iter(tokens))  # an array of another type is only taken as an iterator
        self._size += len(ids)
        self.native.extend(*ids.buffer_info())


class Source:
    """A text to copy from.

    Args:
        name: of its copies' parts. judge: chances of copies from it. habit: how often the first token of the request's
            copies was right; None: unknown.
    """

    def __init__(self, name: str, text: Text, judge: MatchCalibration, habit: RequestCalibration | None = None) -> None:
        self.name, self.text, self.judge, self.habit = name, text, judge, habit
        own = 0 if habit is None else habit.address
        self.fields = array("q", (text.native.at, *judge.addresses, own, 0, -1, 0))


class Prediction(Source):
    """The answer that a request's caller predicts (OpenAI's predicted outputs). `follow` is given the answer.

    An answer follows its prediction token by token. Once it differs, the place at which it comes back is searched: the
    longest match with the answer's end, and of equals the nearest one ahead of where it left.

    Args:
        tokens: the predicted answer's. prompt: number of tokens that `follow` is given before the answer's.
            judge: chances of this request's copies from it: how right a caller is says nothing of other copies.
    """

    def __init__(
        self, compiled: "CompiledCopies", tokens: Sequence[int], prompt: int = 0, judge: MatchCalibration | None = None
    ) -> None:
        super().__init__("prediction", Text(compiled, tokens), judge or MatchCalibration())
        self._compiled, self._prompt, self._answer = compiled, prompt, 0
        self._arrays = array("B", bytes(max(len(tokens), 1))), array("i", [0]) * MAX_MATCH
        addresses = (each.buffer_info()[0] for each in self._arrays)
        self._followed: array[int] = array("q", (self.text.native.at, *addresses, 0, BEGINNING, 0, 0, 0))
        self.fields[4] = self._followed.buffer_info()[0]

    @property
    def place(self) -> tuple[int, int]:
        """Return the length of the match at which the answer goes on, and its place in the prediction."""
        return self._followed[4], self._followed[5]

    @property
    def accepted(self) -> int:
        """Return the number of predicted tokens that the answer had where they were expected, each counted once."""
        return self._followed[7]

    @property
    def rejected(self) -> int:
        """Return the number of its tokens that the answer did not have where they were expected."""
        return len(self.text) - self.accepted

    @property
    def is_followed(self) -> bool:
        """Whether most of the answer so far followed it."""
        return 2 * (self.accepted + BEGINNING) >= self._answer

    def follow(self, tokens: Sequence[int]) -> None:
        """Compare the prediction with the text's next tokens, with bounded work for each."""
        answer = tokens[self._prompt :]
        self._prompt = max(self._prompt - len(tokens), 0)
        self._answer += len(answer)
        self._compiled.follow(self._followed, answer)

"""The text that a caller expects as answer, and the answer's place in it (OpenAI's predicted outputs).

An answer follows its prediction token by token. Once it differs, the place at which it comes back is searched: the
longest match with the answer's end, and of equals the nearest one ahead of where it left.
"""

from collections import deque
from collections.abc import Sequence

from whiflash_sglang.copying.calibration import MatchCalibration
from whiflash_sglang.copying.index import MAX_MATCH, Place, SuffixIndex

BEGINNING = 6
"""Match length of a prediction's beginning while nothing is written yet that could match."""

NEAR = 64
"""Number of tokens, after the place where an answer left its prediction, at which every place is compared."""

SETTLED = 3
"""Tokens that an answer follows at a new place before the search begins there instead of where it left earlier."""


class Prediction:
    """One request's prediction. `follow` is given the answer; `place` is where the answer goes on if it is right.

    Args:
        tokens: the predicted answer's. prompt: number of tokens that `follow` is given before the answer's.
            calibration: chances of this request's copies from it: how right a caller is says nothing of other copies.
    """

    def __init__(
        self, tokens: Sequence[int], prompt: int = 0, calibration: MatchCalibration | None = None
    ) -> None:
        self.calibration = calibration or MatchCalibration()
        self.text = SuffixIndex(tokens, growing=False)
        self.place = Place(BEGINNING, 0, self.text)
        self._tokens = tokens
        self._appeared = bytearray(len(tokens))
        self.accepted = 0
        """Tokens of the prediction that appeared in the answer where they were expected, each counted once."""
        self._end: deque[int] = deque(maxlen=MAX_MATCH)
        self._left = 0
        self._prompt, self._answer = prompt, 0

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def is_followed(self) -> bool:
        """Whether most of the answer so far followed it."""
        return 2 * (self.accepted + BEGINNING) >= self._answer

    @property
    def rejected(self) -> int:
        """Return the number of its tokens that did not appear in the answer where they were expected."""
        return len(self) - self.accepted

    def follow(self, tokens: Sequence[int]) -> None:
        """Advance by tokens of the text, with bounded work for each."""
        answer = tokens[self._prompt :]
        self._prompt = max(self._prompt - len(tokens), 0)
        self._answer += len(answer)
        for token in answer:
            self._end.append(token)
            length, source, text = self.place
            if length and source < len(self) and self._tokens[source] == token:
                self.accepted += not self._appeared[source]
                self._appeared[source] = True
                self.place = Place(min(length + 1, MAX_MATCH), source + 1, text)
                if length >= SETTLED:
                    self._left = source + 1
            else:
                self.place = self._nearest(list(self._end))

    def place_behind(self, drafts: Sequence[int]) -> Place:
        """Return the place at which the answer goes on after `drafts`, if these are right."""
        if not drafts:
            return self.place
        length, source, text = self.place
        ahead = self._tokens[source : source + len(drafts)]
        if length and list(ahead) == list(drafts):
            return Place(min(length + len(drafts), MAX_MATCH), source + len(drafts), text)
        return self._nearest([*self._end, *drafts][-MAX_MATCH:])

    def _nearest(self, end: Sequence[int]) -> Place:
        window = range(self._left, min(self._left + NEAR, len(self)))
        places = [self.text.place_at(i + 1, end) for i in window if self._tokens[i] == end[-1]]
        places += self.text.places_of(end)
        return max(places, key=self._nearness, default=Place(0, self._left, self.text))

    def _nearness(self, place: Place) -> tuple[int, bool, int]:
        """Rank a place: a longer match first, then one ahead of where the answer left, then a near one."""
        return place.length, place.source > self._left, -abs(place.source - self._left)

"""What rules for copying could accept at most: bounds in hindsight, for whoever asks what limits them.

A rule that proposes what followed one earlier place of the last token accepts no more in a round than the place does
that goes on longest as the answer goes on. Taking it in every round is also best over all rounds: who copies from it a
few tokens later still comes as far. Two places joined in one round, and text of other arms, are outside of it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from whiflash_sglang.lab.recorded.turns import Turn
from whiflash_sglang.lookup.forms import escaped
from whiflash_sglang.lookup.index import GAP
from whiflash_sglang.lookup.readings import pieces_of, readings
from whiflash_sglang.spans.vocabulary import Vocabulary

Tokens = NDArray[np.int32]

NO_TOKENS: Tokens = np.empty(0, dtype=np.int32)


class Bound:
    """An arm that knows the answer, and proposes what of it one earlier place would have proposed.

    Args:
        width: tokens of a proposal, at most. memory: whether earlier answers of the same category hold places too.
        forms: the target's vocabulary, where the prompt's messages hold places in every way that `lookup.readings`
            reads them, written plainly and JSON-escaped (not at other indents, nor with other numbers); None: as they
            are. match: tokens before a place that are those before the draft, at least: what a rule could know it by.
    """

    def __init__(
        self, width: int, *, memory: bool = False, forms: Vocabulary | None = None, match: int = 1
    ) -> None:
        self._width, self._memory, self._vocabulary, self._match = width, memory, forms, match
        self._answers: dict[str, list[Tokens]] = {}
        self._dressed: dict[str, Tokens] = {}
        self._conversation = ""
        self._own = self._others = NO_TOKENS
        self._known = 0

    def begin(self, turn: Turn) -> None:
        if turn.conversation.id != self._conversation:
            self._conversation, self._dressed = turn.conversation.id, {}
        self._own = np.array([*turn.prompt, *turn.answer], dtype=np.int32)
        self._known = len(turn.prompt)
        answers = self._answers.setdefault(turn.conversation.category, [])
        self._others = _joined([*(answers if self._memory else ()), *self._forms(turn.prompt)])
        answers.append(np.array(turn.answer, dtype=np.int32))

    def extend(self, tokens: Sequence[int]) -> None:
        self._known += len(tokens)

    def propose(self, limit: int) -> Sequence[int]:
        written, ahead = self._own[: self._known], self._own[self._known :][: min(limit, self._width)]
        end = written[-self._match :]
        if len(end) < self._match:
            return []
        longest = max(
            _longest(self._own, written[:-1], end, ahead), _longest(self._others, self._others, end, ahead)
        )
        return [int(token) for token in ahead[:longest]]

    def _forms(self, prompt: Sequence[int]) -> list[Tokens]:
        """Every message of the prompt in every form, cut into tokens once a conversation."""
        if self._vocabulary is None:
            return []
        pieces = list(pieces_of(prompt, self._vocabulary.token_bytes, self._vocabulary.special))
        for piece in pieces:
            if piece not in self._dressed:
                said = [reading.text for reading in readings(piece)]
                texts = dict.fromkeys((*said, *map(escaped, said)))
                encode = self._vocabulary.encode
                self._dressed[piece] = _joined([np.array(encode(text), dtype=np.int32) for text in texts])
        return [self._dressed[piece] for piece in pieces]


def _joined(texts: Sequence[Tokens]) -> Tokens:
    """Texts behind one another, with a gap behind each."""
    gap = np.array([GAP], dtype=np.int32)
    return np.concatenate([part for text in texts for part in (text, gap)]) if texts else NO_TOKENS


def _longest(text: Tokens, among: Tokens, end: Tokens, ahead: Tokens) -> int:
    """How many tokens of `ahead` follow in `text`, at most, behind a place of `end` in `among`, its beginning."""
    places = np.flatnonzero(among == end[-1]) + 1
    for back, token in enumerate(end[::-1], 1):
        places = places[places >= back]
        places = places[text[places - back] == token]
    for depth, token in enumerate(ahead):
        places = places[places + depth < len(text)]
        places = places[text[places + depth] == token]
        if not len(places):
            return depth
    return len(ahead) if len(places) else 0

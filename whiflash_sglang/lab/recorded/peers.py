"""Prompt lookup decoding: what followed the first earlier occurrence of the text's last n tokens.

Source: apoorvumang/prompt-lookup-decoding, as in `transformers` (`PromptLookupCandidateGenerator`) and vLLM's
`ngram`: the longest n-gram that occurs earlier decides, the earliest place of several, a fixed number of tokens is
copied.

SuffixDecoding (arXiv 2411.04975): the most frequent continuations of the text's suffixes, scored by frequency.

Two trees are searched: one over the request's prompt and answer, one over the answers of all requests. For every
suffix of the text that occurs in a tree, from its node along the most frequent child, no more tokens than the suffix
is long times a factor, as long as the path's probability, the product of child count over node count, is at least
`min_prob`; the candidate with the largest sum of probabilities wins, the longer suffix of equals, the request's own
tree of equals. Counts are of occurrences, that at the text's end included. Among equally frequent children the one
seen last is taken. Source: snowflakedb/ArcticInference (`suffix_decoding/`), whose defaults as in vLLM
(`suffix_decoding_*`) are used here.

A node of a suffix tree is a set of occurrences; the sets are kept, not the tree: the same answers, for the same
counts.
"""

from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from whiflash_sglang.lab.recorded.conversation import Turn
from whiflash_sglang.lookup.forms import escaped
from whiflash_sglang.lookup.index import GAP
from whiflash_sglang.lookup.readings import pieces_of, readings
from whiflash_sglang.spans.vocabulary import Vocabulary

NGRAM = 3
TOKENS = 10
"""The published default: n from 3 down to 1, ten tokens."""


class PromptLookup:
    """One text that grows.

    Args:
        ngram: longest n-gram that is looked for, down to one token. tokens: most tokens that are copied.
    """

    def __init__(self, ngram: int = NGRAM, tokens: int = TOKENS) -> None:
        self._ngram, self._count = ngram, tokens
        self._text: list[int] = []
        # n-gram → where its first occurrence ends, exclusively; only of those that something follows.
        self._first: dict[tuple[int, ...], int] = {}

    @property
    def text(self) -> Sequence[int]:
        """All tokens so far."""
        return self._text

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            end = len(self._text)
            for n in range(1, min(self._ngram, end) + 1):
                self._first.setdefault(tuple(self._text[end - n :]), end)
            self._text.append(token)

    def propose(self) -> Sequence[int]:
        """What to draft after the text's end."""
        end = len(self._text)
        for n in range(min(self._ngram, end - 1), 0, -1):
            place = self._first.get(tuple(self._text[end - n :]))
            if place is not None:
                return self._text[place : place + self._count]
        return ()


DEPTH = 24
"""Depth of the trees: matched and drafted tokens together."""

FACTOR = 1.0
MIN_PROB = 0.1
CACHED_REQUESTS = 10_000

_GAP = -1


class Candidate(NamedTuple):
    """tokens: what to draft. score: the sum of their probabilities."""

    tokens: list[int]
    score: float


NOTHING = Candidate([], 0.0)


class Occurrences:
    """Texts, appended to the last of them, and for every token the places where it occurs."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._ends: dict[int, array[int]] = defaultdict(lambda: array("i"))
        self._starts: list[int] = []

    def begin(self, keep: int) -> None:
        """A further text; the `keep` newest of the earlier ones stay."""
        self._tokens.append(_GAP)
        self._starts.append(len(self._tokens))
        del self._starts[: -keep - 1]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the last text."""
        for place, token in enumerate(tokens, len(self._tokens)):
            self._ends[token].append(place)
        self._tokens.extend(tokens)

    def speculate(self, text: Sequence[int], depth: int, factor: float, min_prob: float) -> Candidate:
        """The best candidate behind the end of `text`."""
        best, ends = NOTHING, self._newest(text[-1]) if text else None
        tokens = np.frombuffer(self._tokens, dtype=np.int32) if len(self._tokens) else None
        length = 1
        while ends is not None and tokens is not None and len(ends) and length < depth:
            limit = min(int(length * factor + 1e-6), depth - length)
            candidate = _along(tokens, ends, limit, min_prob)
            if candidate.score >= best.score:
                best = candidate
            length += 1
            if length > len(text):
                break
            ends = ends[ends >= length - 1]
            ends = ends[tokens[ends - length + 1] == text[-length]]
        return best

    def _newest(self, token: int) -> NDArray[np.int32] | None:
        if token not in self._ends or not self._starts:
            return None
        ends = np.frombuffer(self._ends[token], dtype=np.int32)
        return ends[np.searchsorted(ends, self._starts[0]) :]


def _along(tokens: NDArray[np.int32], ends: NDArray[np.int32], limit: int, min_prob: float) -> Candidate:
    """The path of most frequent children from the node whose occurrences end at `ends` (rising)."""
    path: list[int] = []
    probability, score = 1.0, 0.0
    while len(path) < limit:
        count = len(ends)
        following = ends[ends + 1 < len(tokens)] + 1
        said = tokens[following]
        following, said = following[said != _GAP], said[said != _GAP]
        if not len(said):
            break
        token = _most_frequent(said)
        ends = following[said == token]
        probability *= len(ends) / count
        if probability < min_prob:
            break
        path.append(token)
        score += probability
    return Candidate(path, score)


def _most_frequent(said: NDArray[np.int32]) -> int:
    """The most frequent token, of several the last one."""
    if len(said) == 1:
        return int(said[0])
    found, last, counts = np.unique(said[::-1], return_index=True, return_counts=True)
    best = counts == counts.max()
    return int(found[best][last[best].argmin()])


class SuffixDecoding:
    """One server's: requests one after the other.

    Args:
        depth, factor, min_prob: as above. cached_requests: answers that the tree of all requests keeps; 0: none.
    """

    def __init__(
        self,
        depth: int = DEPTH,
        factor: float = FACTOR,
        min_prob: float = MIN_PROB,
        cached_requests: int = CACHED_REQUESTS,
    ) -> None:
        self._depth, self._factor, self._min_prob = depth, factor, min_prob
        self._keep = cached_requests
        self._all = Occurrences()
        self.begin()

    @property
    def text(self) -> Sequence[int]:
        """The request's prompt and answer so far."""
        return self._text

    def begin(self, prompt: Sequence[int] = ()) -> None:
        """A new request."""
        self._text: list[int] = []
        self._own = Occurrences()
        self._own.begin(0)
        self.go_on(prompt)

    def go_on(self, prompt: Sequence[int]) -> None:
        """A new request, whose prompt is the last one's text and `prompt`."""
        self._text += prompt
        self._own.extend(prompt)
        if self._keep:
            self._all.begin(self._keep)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append what was written."""
        self._text += tokens
        self._own.extend(tokens)
        if self._keep:
            self._all.extend(tokens)

    def propose(self) -> Sequence[int]:
        """What to draft after the text's end."""
        options = (self._depth, self._factor, self._min_prob)
        end = self._text[-self._depth :]
        own, other = self._own.speculate(end, *options), self._all.speculate(end, *options)
        return own.tokens if own.score >= other.score else other.tokens


Tokens = NDArray[np.int32]

NO_TOKENS: Tokens = np.empty(0, dtype=np.int32)


class Bound:
    """An arm that knows the answer, and proposes what of it one earlier place would have proposed: what rules for
    copying could accept at most.

    A rule that proposes what followed one earlier place of the last token accepts no more in a round than the place
    does that goes on longest as the answer goes on. Taking it in every round is also best over all rounds: who copies
    from it a few tokens later still comes as far. Two places joined in one round, and text of other arms, are outside.

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

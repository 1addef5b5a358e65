"""Where the end of a text occurred before: hash chains over bigrams, as in LZ77.

Source: prompt lookup decoding; SuffixDecoding (arXiv 2411.04975) keeps a suffix tree of frequencies instead. For
one request's own few thousand tokens the longest recent match serves as well, and chains are bounded in the worst
case: a query looks at `MAX_CANDIDATES` earlier places and compares `MAX_MATCH` tokens at most, whatever the text.
Memory: 8 bytes of token, 4 of chain, and a dictionary entry for each distinct bigram (about 110 bytes a token).
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MAX_CANDIDATES = 16
"""Earlier occurrences of the last bigram that a query compares, newest first."""

MAX_MATCH = 32
"""Longest match that is told apart from longer ones."""

_SHIFT = 32


class Match(NamedTuple):
    """`length` tokens before `source` equal the last `length` tokens; what stands at `source` is what followed."""

    length: int
    source: int


NO_MATCH = Match(0, 0)


class SuffixIndex:
    """The tokens of one request, extended at the end only."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens = array("q")
        self._previous = array("i")  # entry i: the last place before i that ends in the same bigram, or -1
        self._newest: dict[int, int] = {}
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens; constant time each."""
        text, previous, newest = self._tokens, self._previous, self._newest
        before = text[-1] if text else -1
        for token in tokens:
            end = len(text)
            text.append(token)
            key = (before + 1) << _SHIFT | token
            previous.append(newest.get(key, -1))
            newest[key] = end
            before = token

    def match(self) -> Match:
        """The longest earlier occurrence of the text's end, of at least two tokens; the newest of equals."""
        text, end = self._tokens, len(self._tokens) - 1
        best = NO_MATCH
        place = self._previous[end] if end >= 1 else -1
        for _ in range(MAX_CANDIDATES):
            if place < 1:
                break
            # An overlapping occurrence is allowed: a repeated unit continues itself.
            length = 2
            limit = min(place + 1, MAX_MATCH)
            while length < limit and text[place - length] == text[end - length]:
                length += 1
            if length > best.length:
                best = Match(length, place + 1)
                if length == MAX_MATCH:
                    break
            place = self._previous[place]
        return best

    def continuation(self, source: int, count: int) -> Sequence[int]:
        """`count` tokens from `source`; where the text ends, it goes on with what it copied."""
        text, size = self._tokens, len(self._tokens)
        period = size - source
        return [text[source + i % period] for i in range(count)]

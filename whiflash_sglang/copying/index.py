"""Finds where a text's end occurred earlier, by hash chains over one and two tokens, as in LZ77.

Source: prompt lookup decoding; SuffixDecoding (arXiv 2411.04975) keeps a suffix tree of frequencies instead. Bounded
for any text: a query follows `MAX_STEPS` links of a chain, keeps `MAX_CANDIDATES` places and compares `MAX_MATCH`
tokens at each. Memory is three flat arrays and two tables of heads: 20 to 36 bytes a token.
"""

from array import array
from collections.abc import Iterable, Sequence
from sys import getsizeof
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from whiflash_kernels.cpu.copies import CompiledCopies

MAX_CANDIDATES = 8
"""Number of occurrences that a query keeps, newest first. Four did as well as 32 on training answers."""

MAX_STEPS = 32
"""Number of a chain's links that a query follows. Places of other tokens with the same hash count too."""

MAX_MATCH = 32
"""Longest match that is measured: a longer one counts as this long."""

GAP = -1
"""Id before a text's first token; no token has it. Ids below it are positions of images (`core.readable`)."""

_FIRST_HEADS = 256
_MIX = 0x9E3779B1  # Knuth's multiplicative hash: 2^32 over the golden ratio


class Place(NamedTuple):
    """A place that matches: the `length` tokens before `source` in `text` equal the end that was searched for."""

    length: int
    source: int
    text: "SuffixIndex"


class SuffixIndex:
    """An index of a text that is extended at the end only.

    Args:
        growing: whether this text's own end is searched for, so that a copy that reaches the end goes on with what it
            copied; otherwise it ends there.
        compiled: links the chains in place of `_link`; None: there is no compiler.

    Attributes:
        fields: the arrays' addresses and sizes, for compiled code; valid until the next `extend`.
    """

    def __init__(
        self, tokens: Iterable[int] = (), *, growing: bool = True, compiled: "CompiledCopies | None" = None
    ) -> None:
        self._growing, self._broken, self._compiled = growing, False, compiled
        self._tokens = array("i")
        self._allocate(_FIRST_HEADS)
        self.extend(tokens)

    def _allocate(self, size: int) -> None:
        """Allocate chains for `size` tokens, without links."""
        # Chain entry i: the last place before i with the same hash of its last token, or of its last two; -1: none.
        self._one_before, self._two_before, self._one_heads, self._two_heads = arrays = [
            array("i", [-1]) * size for _ in range(4)
        ]
        self.fields = array("q", (0, *(each.buffer_info()[0] for each in arrays), 0, size - 1, 0))

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def end(self) -> Sequence[int]:
        """Return the last `MAX_MATCH` tokens: all that a search compares."""
        return self._tokens[-MAX_MATCH:]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the arrays, their reserve included."""
        arrays = (self._tokens, self._one_before, self._two_before, self._one_heads, self._two_heads)
        return sum(getsizeof(a) for a in arrays)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens, in constant time each, averaged over the doublings of the tables."""
        start = len(self._tokens)
        self._tokens.extend(iter(tokens))  # an array of another type is only taken as an iterator
        self._broken = self._broken or min(self._tokens[start:], default=0) < 0
        if len(self._tokens) > len(self._one_heads):
            self._allocate(1 << (len(self._tokens) - 1).bit_length())
            start = 0
        self.fields[0], self.fields[5] = self._tokens.buffer_info()
        self.fields[7] = self._broken
        if self._compiled is None:
            self._link(start)
        else:
            self._compiled.link(self.fields, start)

    def _link(self, start: int) -> None:
        text, ones, twos = self._tokens, self._one_heads, self._two_heads
        one_before, two_before, mask = self._one_before, self._two_before, len(self._one_heads) - 1
        before = text[start - 1] if start else GAP
        for place in range(start, len(text)):
            token = text[place]
            one = token & mask
            one_before[place] = ones[one]
            ones[one] = place
            two = ((before * _MIX >> 12) ^ token) & mask
            two_before[place] = twos[two]
            twos[two] = place
            before = token

    def places(self) -> list[Place]:
        """Return earlier occurrences of the text's own end, newest first: of two tokens or more, else of one."""
        end = len(self._tokens) - 1
        if end < 1:
            return []
        return self._follow(self._two_before[end], self._one_before[end], self.end)

    def places_of(self, suffix: Sequence[int]) -> list[Place]:
        """Return where the last two or more tokens of `suffix`, else its last one, occur in this text, newest first."""
        if not suffix or not self._tokens:
            return []
        suffix = suffix[-MAX_MATCH:]
        mask, last = len(self._one_heads) - 1, suffix[-1]
        two = self._two_heads[((suffix[-2] * _MIX >> 12) ^ last) & mask] if len(suffix) > 1 else -1
        return self._follow(two, self._one_heads[last & mask], suffix)

    def place_at(self, source: int, suffix: Sequence[int]) -> Place:
        """Measure how far the tokens before `source` match the end of a text; length 0 if not, or beyond this text.

        suffix: the last tokens of the text that is searched for, at most `MAX_MATCH`.
        """
        text, length, limit = self._tokens, 0, len(suffix)
        # A match of full length takes one comparison, of arrays in C.
        if limit <= source <= len(text) and text[source - limit : source] == suffix:
            return Place(limit, source, self)
        limit = min(source, limit) if source <= len(text) else 0
        while length < limit and text[source - 1 - length] == suffix[-1 - length]:
            length += 1
        return Place(length, source, self)

    def _follow(self, two: int, one: int, suffix: Sequence[int]) -> list[Place]:
        text, last = self._tokens, suffix[-1]
        before = suffix[-2] if len(suffix) > 1 else GAP
        places: list[Place] = []
        for _ in range(MAX_STEPS):
            if two < 1 or len(places) == MAX_CANDIDATES:
                break
            # Occurrences may overlap the text's end: a repeated unit continues itself.
            if text[two] == last and text[two - 1] == before:
                places.append(self.place_at(two + 1, suffix))
            two = self._two_before[two]
        if places:
            return places
        for _ in range(MAX_STEPS):
            if one < 0 or len(places) == MAX_CANDIDATES:
                break
            if text[one] == last:
                places.append(Place(1, one + 1, self))
            one = self._one_before[one]
        return places

    def continuation(self, source: int, count: int, drafts: Sequence[int] = ()) -> Sequence[int]:
        """Return up to `count` tokens from `source` on, before the first below zero. At the end of a growing text
        `drafts` follow, then the copy repeats.
        """
        ahead = self._tokens[source : source + count]
        if self._broken and min(ahead, default=0) < 0:
            return ahead[: next(i for i, token in enumerate(ahead) if token < 0)]
        if not self._growing:
            return ahead
        if len(ahead) < count:
            ahead.extend(drafts[: count - len(ahead)])
            period = len(ahead)
            return (ahead * (count // period + 1))[:count] if period else ahead
        return ahead

"""What probably follows where a grammar leaves little choice: punctuation in the layout of the text so far, and words
of the schema.

Only what a matcher takes is guessed, so nothing here knows schemas: it asks which of a few texts may follow.
"""

from collections.abc import Callable, Mapping, Sequence

from whiflash_sglang.structure.chances import Kind
from whiflash_sglang.structure.layout import Layout
from whiflash_sglang.structure.matchers import Matcher
from whiflash_sglang.structure.pieces import Piece

VALUES = ('"', "{", "[", "0", "t", "n")
"""How values of each type begin; a negative number, and false, where a positive one, and true, may stand."""

OPENING = VALUES[:3]
"""Of these the ones after which more can be said."""

FREE = "‡"
"""Allowed inside a string only where nearly anything is."""


class Guesses:
    """For one request.

    Args:
        words: names and values of its schema, in its order. used: how often each of them was used in the conversation,
            asked once, when there is a choice.
    """

    def __init__(self, words: Sequence[str], used: Callable[[Sequence[str]], Mapping[str, int]]) -> None:
        self._words, self._count = words, used
        self._used: Mapping[str, int] | None = None

    def next(self, matcher: Matcher, layout: Layout) -> Piece | None:
        """A text that may follow where nothing is forced; None where it is anybody's guess."""
        if layout.inside:
            return self._word(matcher, layout.partial)
        if layout.last in ("", "{", "[", ",", ":"):
            return _opening(matcher, layout)
        if layout.last.isdigit():
            return None  # a number may go on
        return _closing(matcher, layout)

    def _word(self, matcher: Matcher, partial: str) -> Piece | None:
        if not self._words or allows(matcher, FREE):
            return None
        rests = {
            word: word[len(partial) :] + '"'
            for word in self._words
            if word.startswith(partial) and allows(matcher, word[len(partial) :] + '"')
        }
        if not rests:
            return None
        if self._used is None:
            self._used = self._count(self._words)
        used = self._used
        best = max(rests, key=lambda word: used.get(word, 0))
        others = [used.get(word, 0) for word in rests if word != best]
        # A list of tools names each of them once.
        return Piece(rests[best], Kind.USED if used.get(best, 0) > max(others, default=0) else Kind.WORD)


def allows(matcher: Matcher, text: str) -> bool:
    """Whether `text` may follow."""
    with matcher.trying():
        return matcher.accept_text(text)


def _opening(matcher: Matcher, layout: Layout) -> Piece | None:
    """A key or a value begins, or its brackets close at once."""
    possible = [value for value in VALUES if allows(matcher, value)]
    if not possible:
        return _closing(matcher, layout)
    if len(possible) != 1:
        blank, seen = layout.blank_before('"')
        if blank and layout.last in ",:" and allows(matcher, blank):
            return Piece(blank, Kind.LAYOUT if seen else Kind.USUAL)
        return None
    (value,) = possible
    blank, seen = layout.blank_before(value)
    text = blank + value if value in OPENING else blank
    if not text or not allows(matcher, text):
        return None
    return Piece(text, Kind.LAYOUT if seen else Kind.USUAL)


def _closing(matcher: Matcher, layout: Layout) -> Piece | None:
    """A key or a value has ended."""
    possible = [mark for mark in ":,}]" if allows(matcher, mark)]
    if not possible:
        return None
    mark = possible[0]
    blank, seen = layout.blank_before(mark)
    text = blank + mark
    if not allows(matcher, text):
        return None
    if len(possible) > 1:
        return Piece(text, Kind.CHOICE)
    return Piece(text, Kind.LAYOUT if seen else Kind.USUAL)

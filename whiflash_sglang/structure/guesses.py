"""The probable continuation where a grammar leaves little choice: punctuation in the layout of the text so far, and
words of the schema.

Only what a matcher takes is guessed, so nothing here knows schemas: it asks which of a few texts may follow.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

from whiflash_sglang.drafts.candidates import common_prefix
from whiflash_sglang.structure.chances import Kind, LikelyText
from whiflash_sglang.structure.layout import Layout
from whiflash_sglang.structure.matchers import Matcher

VALUES = ('"', "{", "[", "0", "t", "n")
"""How values of each type begin; a negative number, and false, if a positive one, and true, are allowed."""

OPENING = VALUES[:3]
"""Beginnings after which more can be proposed."""

FREE = "‡"
"""Allowed only where nearly anything is: in free text, and inside a string without bounds."""


class Guesses:
    """Guesses for one request.

    Args:
        words: names and values of its schema, in its order. used: how often each of them was used in the conversation,
            asked once, when there is a choice.
    """

    def __init__(self, words: Sequence[str], used: Callable[[Sequence[str]], Mapping[str, int]]) -> None:
        self._words, self._count = words, used
        self._used: Mapping[str, int] | None = None

    def next(self, matcher: Matcher, layout: Layout) -> list[LikelyText]:
        """A likely continuation where nothing is forced; nothing if all are equally likely."""
        if matcher.allows(FREE):
            return []
        if layout.inside:
            return self._word(matcher, layout.partial)
        if layout.last in ("", "{", "[", ",", ":"):
            return _opening(matcher, layout)
        if layout.last.isdigit():
            return []  # a number may go on
        return _closing(matcher, layout)

    def _word(self, matcher: Matcher, partial: str) -> list[LikelyText]:
        """The rest of a name or a listed value; if others are allowed there, its kind is that of what parts it from
        them.
        """
        rests = {
            word: word[len(partial) :] + '"'
            for word in self._words
            if word.startswith(partial) and matcher.allows(word[len(partial) :] + '"')
        }
        if not rests:
            return []
        if self._used is None:
            self._used = self._count(self._words)
        used = self._used
        best = max(rests, key=lambda word: used.get(word, 0))
        others = [word for word in rests if word != best]
        # A list of tools names each of them once.
        highest = max((used.get(word, 0) for word in others), default=0)
        kind = Kind.USED if used.get(best, 0) > highest else Kind.WORD
        return parted(rests[best], [rests[word] for word in others], kind)


def parted(text: str, others: Sequence[str], kind: Kind) -> list[LikelyText]:
    """`text` in pieces: `kind` are its characters that part it from one of the others, where none does its first."""
    places = sorted({common_prefix(text, other) for other in others} - {len(text)}) or [0]
    pieces, done = [], 0
    for place in places:
        pieces += [LikelyText(text[done:place], Kind.FORCED)] if place > done else []
        pieces.append(LikelyText(text[place], kind))
        done = place + 1
    return pieces + ([LikelyText(text[done:], Kind.FORCED)] if done < len(text) else [])


def _opening(matcher: Matcher, layout: Layout) -> list[LikelyText]:
    """A key or a value begins, or its brackets close at once."""
    possible = [value for value in VALUES if matcher.allows(value)]
    if not possible:
        return _closing(matcher, layout)
    if len(possible) > 1 and layout.last not in (",", ":"):
        return []
    value = possible[0]
    blank, seen = layout.blank_before(value)
    pieces = [LikelyText(blank, Kind.LAYOUT if seen else Kind.USUAL)] if blank else []
    if value in OPENING and len(possible) > 1:
        pieces.append(LikelyText(value, Kind.CHOICE))
    elif value in OPENING:
        pieces = [LikelyText(blank + value, Kind.LAYOUT if seen else Kind.USUAL)]
    return pieces if pieces and matcher.allows("".join(piece.text for piece in pieces)) else []


def _closing(matcher: Matcher, layout: Layout) -> list[LikelyText]:
    """A key or a value has ended."""
    possible = [mark for mark in ":,}]" if matcher.allows(mark)]
    if not possible:
        return []
    mark = possible[0]
    blank, seen = layout.blank_before(mark)
    text = blank + mark
    if blank and not matcher.allows(text):
        return []
    if len(possible) > 1:
        return [LikelyText(text, Kind.CHOICE)]
    return [LikelyText(text, Kind.LAYOUT if seen else Kind.USUAL)]


STEPS = 32
"""Pieces that are asked for in a row."""

HOPELESS = 0.02
"""Chance below which nothing behind a piece is looked for."""

Likelihood = Callable[[Kind], float]
"""Likelihood of a kind."""


def gather(
    step: Callable[[int], Sequence[LikelyText] | None], limit: int, likelihood: Likelihood
) -> list[LikelyText]:
    """Pieces of `step`, called again and again until it returns None: `limit` characters and `STEPS` pieces at most.

    Args:
        step: pieces of at most so many characters, if it likes; the rest is cut off.
    """
    pieces: list[LikelyText] = []
    chance = 1.0
    for _ in range(STEPS):
        more = step(limit) if limit > 0 and chance >= HOPELESS and len(pieces) < STEPS else None
        if more is None:
            break
        for piece in more:
            if limit > 0:
                pieces.append(piece._replace(text=piece.text[:limit]))
            limit -= len(piece.text)
            chance *= likelihood(piece.kind)
    return pieces


def is_whole(pieces: Sequence[LikelyText], limit: int, likelihood: Likelihood) -> bool:
    """Whether no bound of `gather` ended what it returned."""
    chance = prod(likelihood(piece.kind) for piece in pieces)
    return len(pieces) < STEPS and chance >= HOPELESS and sum(len(piece.text) for piece in pieces) < limit


def likely(
    matcher: Matcher,
    limit: int,
    guesses: Guesses | None,
    layout: Layout,
    likelihood: Likelihood,
    ending: str = "",
) -> list[LikelyText]:
    """Forced text and, if nothing is forced, what `guesses` say; at most `limit` characters.

    The matcher is as it was.

    Args:
        layout: of the text so far; left as it is. ending: what follows a text that is complete.
    """
    layout = layout.copy()

    def step(limit: int) -> list[LikelyText] | None:
        forced = matcher.forced()[:limit]
        pieces = (
            [LikelyText(forced, Kind.FORCED)] if forced else guesses.next(matcher, layout) if guesses else []
        )
        text = "".join(piece.text for piece in pieces)
        if not text or not matcher.accept_text(text):
            return None
        layout.follow(text)
        return pieces

    with matcher.trying():
        pieces = gather(step, limit, likelihood)
        limit -= sum(len(piece.text) for piece in pieces)
        if ending and limit >= len(ending) and matcher.may_end and not matcher.forced():
            pieces.append(LikelyText(ending, Kind.CLOSED))
    return pieces

"""Guesses the continuation where a grammar leaves little choice: punctuation in the layout of the text so far, and
words of the schema.

Only text that a matcher accepts is guessed, so nothing here reads schemas: it asks which of a few texts may follow.
"""

from collections.abc import Callable, Mapping, Sequence

from whiflash_sglang.drafts.candidates import common_prefix
from whiflash_sglang.structure.chances import Kind, LikelyText
from whiflash_sglang.structure.layout import FREE, Layout
from whiflash_sglang.structure.matchers import Matcher

VALUES = ('"', "{", "[", "0", "t", "n")
"""First characters of values, by type. `-` and `f` are left out: they are allowed where `0` and `t` are."""

OPENING = VALUES[:3]
"""First characters after which more can be proposed."""


Uses = Callable[[str], int]
"""Returns how often a text occurs in a conversation."""


class Guesses:
    """Guesses continuations of texts with the same schema.

    Args:
        words: names and values of the schema, in its order. uses: of each of them in the conversation, in quotes.
    """

    def __init__(self, words: Sequence[str], uses: Uses) -> None:
        self._words, self._uses = words, uses

    def next(self, matcher: Matcher, layout: Layout) -> Sequence[LikelyText]:
        """Guess what follows where nothing is forced; empty if no continuation is likelier than others."""
        if matcher.allows(FREE):
            return []
        if layout.inside:
            begun = layout.partial
            rests = {word: word[len(begun) :] + '"' for word in self._words if word.startswith(begun)}
            allowed = {f'"{word}"': rest for word, rest in rests.items() if matcher.allows(rest)}
            return of_words(allowed, self._uses) if allowed else []
        if layout.last in ("", "{", "[", ",", ":"):
            return _opening(matcher, layout)
        if layout.last.isdigit():
            return []  # a number may go on
        return _closing(matcher, layout)


def of_words(rests: Mapping[str, str], uses: Uses) -> list[LikelyText]:
    """Return the rest of the likeliest word; characters at which it differs from others are of the kind USED or WORD.

    Args:
        rests: the rest of each word that may follow.
    """
    used = {word: uses(word) for word in rests}
    best = max(rests, key=used.__getitem__)
    others = [word for word in rests if word != best]
    # The prompt's list of tools names each of them once, so only a word used more often than the others counts.
    highest = max((used[word] for word in others), default=0)
    kind = Kind.USED if used[best] > highest else Kind.WORD
    pieces, done = list[LikelyText](), 0
    for piece in parted(rests[best], [rests[word] for word in others], kind):
        among = tuple(word for word, rest in rests.items() if rest.startswith(rests[best][:done]))
        pieces.append(piece._replace(among=() if piece.kind is Kind.FORCED and len(among) == 1 else among))
        done += len(piece.text)
    return pieces


def parted(text: str, others: Sequence[str], kind: Kind) -> list[LikelyText]:
    """Cut `text` into pieces: characters where others part from it, or the first, are of `kind`; others are FORCED."""
    places = sorted({common_prefix(text, other) for other in others} - {len(text)}) or [0]
    pieces, done = [], 0
    for place in places if text else ():
        pieces += [LikelyText(text[done:place], Kind.FORCED)] if place > done else []
        pieces.append(LikelyText(text[place], kind))
        done = place + 1
    return pieces + ([LikelyText(text[done:], Kind.FORCED)] if done < len(text) else [])


def _opening(matcher: Matcher, layout: Layout) -> list[LikelyText]:
    """Guess the beginning of a key or a value, or the bracket that closes an empty container."""
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
    """Guess which of `: , } ]` follows a key or a value that has ended."""
    possible = [mark for mark in ":,}]" if matcher.allows(mark)]
    if not possible:
        return []
    mark = possible[0]
    blank, seen = layout.blank_before(mark)
    text = blank + mark
    if blank and not matcher.allows(text):
        return []
    return [LikelyText(text, Kind.CHOICE if len(possible) > 1 else Kind.LAYOUT if seen else Kind.USUAL)]


STEPS = 32
"""Largest number of pieces that are asked for in a row."""


def gather(step: Callable[[], Sequence[LikelyText] | None], limit: int) -> list[LikelyText]:
    """Call `step` until it returns None and collect its pieces, up to `limit` characters and `STEPS` pieces; text
    beyond the limit is cut off.
    """
    pieces: list[LikelyText] = []
    for _ in range(STEPS):
        more = step() if limit > 0 and len(pieces) < STEPS else None
        if more is None:
            break
        for piece in more:
            if limit > 0:
                pieces.append(piece._replace(text=piece.text[:limit]))
            limit -= len(piece.text)
    return pieces


def likely(ahead: "Ahead", limit: int, ending: str = "") -> list[LikelyText]:
    """Return forced text and, where nothing is forced, guesses, at most `limit` characters; `ending` follows a complete
    text. The matcher is restored.
    """
    with ahead.matcher.trying():
        pieces = gather(ahead.step, limit)
        limit -= sum(len(piece.text) for piece in pieces)
        if ending and limit >= len(ending) and ahead.matcher.ends:
            pieces.append(LikelyText(ending, Kind.CLOSED))
    return pieces


class Ahead:
    """A look ahead in a text under a grammar. layout: of the text; it is not changed."""

    def __init__(self, matcher: Matcher, layout: Layout, guesses: Guesses | None = None) -> None:
        self.matcher, self._layout, self._guesses = matcher, layout.copy(), guesses

    def step(self) -> Sequence[LikelyText] | None:
        """Advance by text that is forced or likely, and return its pieces; None if there is none."""
        forced = self.matcher.forced()
        pieces: Sequence[LikelyText] = [LikelyText(forced, Kind.FORCED)] if forced else []
        if not forced and self._guesses is not None:
            pieces = self._guesses.next(self.matcher, self._layout)
        text = "".join(piece.text for piece in pieces)
        if not text or not self.matcher.accept_text(text):
            return None
        self._layout.follow(text)
        return pieces

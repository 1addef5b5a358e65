"""Guesses the continuation where a grammar leaves little choice: punctuation in the layout of the text so far, and
words of the schema.

Only text that a matcher accepts is guessed, so nothing here reads schemas: it asks which of a few texts may follow.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import takewhile
from math import prod

from whiflash_sglang.drafts.candidates import common_prefix
from whiflash_sglang.spans.vocabulary import Vocabulary, is_text, text_of, whole_text
from whiflash_sglang.structure.chances import Kind, LikelyText
from whiflash_sglang.structure.layout import Layout, is_plain
from whiflash_sglang.structure.matchers import Matcher

VALUES = ('"', "{", "[", "0", "t", "n")
"""First characters of values, by type. `-` and `f` are left out: they are allowed where `0` and `t` are."""

OPENING = VALUES[:3]
"""First characters after which more can be proposed."""

FREE = "‡"
"""A character that is allowed only where nearly any is: in free text, and inside a string without bounds."""


class Place:
    """A grammar's cached answers at one place of its texts.

    pieces: text that is forced or likely. rests: where words may follow, the rest of each instead, since requests use
    words differently. parts: pieces of words. then: places after a text; None: it is refused. free: whether the place
    is in free text, which plain text does not leave. ends: whether the text may end, and nothing is forced. An answer
    is None until it is asked for.
    """

    __slots__ = ("ends", "free", "parts", "pieces", "rests", "then")

    def __init__(self, *, free: bool = False) -> None:
        self.free = free
        self.pieces: Sequence[LikelyText] | None = None
        self.rests: dict[str, str] = {}
        self.parts: dict[tuple[str, Kind], list[LikelyText]] = {}
        self.then: dict[str, Place | None] = {}
        self.ends: bool | None = None


TABLES = 32
"""Number of schemas and lists of tools whose places are cached; the one asked for least recently goes first."""

PLACES = 2048
"""Largest number of cached places per schema, two or three kilobytes each. The cache is cleared when it is full."""

TEXTS = 42
"""Largest number of cached continuations per place. The cache is cleared when it is full."""

Table = dict[Hashable, Place]


class Tables:
    """Caches of places and of kinds of tokens, shared by a server's requests, which have the same grammar engine.

    Args:
        vocabulary: of the target; None: tokens are not followed.
    """

    def __init__(self, vocabulary: Vocabulary | None = None) -> None:
        self.of: Callable[..., Table] = lru_cache(maxsize=TABLES)(lambda *key: Table())
        """Returns the cache of places for a schema, words and habit."""
        self.text = cache(lambda token: whole_text(vocabulary, [token]) if vocabulary else "")
        """Returns a token's text; empty if it begins or ends inside a character, or has none."""
        self.plain = self._kind(is_plain)
        """Whether free text goes on with a token."""
        self.without = lru_cache(maxsize=4)(lambda marks: self._kind(marks.isdisjoint))
        """Whether a token's text has none of these characters."""

    def _kind(self, judge: Callable[[str], bool]) -> Callable[[int], bool]:
        return cache(lambda token: bool(self.text(token)) and judge(self.text(token)))


class Guesses:
    """Guesses the continuations of one request.

    Args:
        words: names and values of its schema, in its order. used: how often each of them was used in the conversation.
            tables: caches of what grammars answered; None: new ones.
    """

    def __init__(self, words: Sequence[str], used: Mapping[str, int], tables: Tables | None = None) -> None:
        self._words, self._used, self._tables = words, used, tables or Tables()
        self._own: dict[str, Table] = {}
        self.text = self._tables.text

    def place(self, layout: Layout) -> Place:
        """Return the cached place at the end of a text; a new one if its schema does not determine the place."""
        place: Place | None = layout.known
        if place is not None:
            return place
        key = layout.place
        if key is None:
            return Place()
        table = self._own.get(layout.source)
        if table is None:
            habit = layout.habit and (frozenset(layout.habit.seen.items()), layout.habit.unit)
            table = self._own[layout.source] = self._tables.of(layout.source, tuple(self._words), habit)
        place = table.get(key)
        if place is None:
            if len(table) >= PLACES:
                for old in table.values():  # else a request that is at one of them would keep all
                    old.then.clear()
                table.clear()
            place = table[key] = Place(free=layout.is_free)
        layout.known = place
        return place

    def next(self, matcher: Matcher, layout: Layout) -> list[LikelyText] | dict[str, str]:
        """Guess what follows where nothing is forced: pieces, or by word its rest; empty if all are as likely."""
        if matcher.allows(FREE):
            return []
        if layout.inside:
            begun = layout.partial
            rests = {word: word[len(begun) :] + '"' for word in self._words if word.startswith(begun)}
            return {word: rest for word, rest in rests.items() if matcher.allows(rest)}
        if layout.last in ("", "{", "[", ",", ":"):
            return _opening(matcher, layout)
        if layout.last.isdigit():
            return []  # a number may go on
        return _closing(matcher, layout)

    def of_words(self, place: Place) -> list[LikelyText]:
        """Return the rest of the likeliest word; characters that part it from other words are USED or WORD."""
        rests, used = place.rests, self._used
        best = max(rests, key=lambda word: used.get(word, 0))
        others = [word for word in rests if word != best]
        # The prompt's list of tools names each of them once, so only a word used more often than the others counts.
        highest = max((used.get(word, 0) for word in others), default=0)
        kind = Kind.USED if used.get(best, 0) > highest else Kind.WORD
        if (best, kind) not in place.parts:
            place.parts[best, kind] = parted(rests[best], [rests[word] for word in others], kind)
        return place.parts[best, kind]


def parted(text: str, others: Sequence[str], kind: Kind) -> list[LikelyText]:
    """Cut `text` into forced pieces and characters of `kind`: those that part it from `others`, else the first."""
    places = sorted({common_prefix(text, other) for other in others} - {len(text)}) or [0]
    pieces, done = [], 0
    for place in places:
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
    """Guess the mark after a key or a value that has ended."""
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

HOPELESS = 0.02
"""Chance of all pieces so far below which no further piece is asked for."""

Likelihood = Callable[[Kind], float]
"""Returns the chance that a token of a kind is right."""


def gather(step: Callable[[], Sequence[LikelyText] | None], limit: int, likelihood: Likelihood) -> list[LikelyText]:
    """Call `step` until it returns None and collect its pieces, up to `limit` characters and `STEPS` pieces; text
    beyond the limit is cut off.
    """
    pieces: list[LikelyText] = []
    chance = 1.0
    for _ in range(STEPS):
        more = step() if limit > 0 and chance >= HOPELESS and len(pieces) < STEPS else None
        if more is None:
            break
        for piece in more:
            text, kind = piece
            if limit > 0:
                pieces.append(piece if len(text) <= limit else LikelyText(text[:limit], kind))
            limit -= len(text)
            chance *= likelihood(kind)
    return pieces


def is_whole(pieces: Sequence[LikelyText], limit: int, likelihood: Likelihood) -> bool:
    """Whether none of `gather`'s bounds cut its result short."""
    chars = sum(len(piece.text) for piece in pieces)
    return len(pieces) < STEPS and chars < limit and prod(likelihood(kind) for _, kind in pieces) >= HOPELESS


def likely(ahead: "Ahead", limit: int, likelihood: Likelihood, ending: str = "") -> list[LikelyText]:
    """Return forced text and, where nothing is forced, guesses, at most `limit` characters; `ending` follows a complete
    text. `ahead` advances by them; its matcher is as it was afterwards.
    """
    with ahead.matcher.trying():
        pieces = gather(ahead.step, limit, likelihood)
        limit -= sum(len(piece.text) for piece in pieces)
        if ending and limit >= len(ending) and ahead.ends():
            pieces.append(LikelyText(ending, Kind.CLOSED))
    return pieces


class Ahead:
    """A look ahead in a text. Its matcher and layout advance only where a place has no cached answer.

    Args:
        matcher: of the text without its last tokens, `unseen`. layout: of the text; it is not changed.

    Attributes:
        by_place: whether tokens are followed by cached places, which is impossible from inside a character. lost:
            whether the matcher refused text that places allow: no time is left.
    """

    def __init__(
        self, matcher: Matcher, layout: Layout, guesses: Guesses | None = None, unseen: Sequence[int] = ()
    ) -> None:
        self.matcher, self._layout, self._guesses, self._unseen = matcher, layout, guesses, unseen
        self.by_place = layout.words is not None
        self._place = guesses.place(layout) if guesses else Place()
        self._own: Layout | None = None
        self._passed: list[str] = []
        self.lost = False

    def fork(self, passed: str | None = None) -> "Ahead":
        """Return another look at the same place. passed: text that the matcher and the layout have yet to follow."""
        fork = object.__new__(Ahead)
        fork.__dict__.update(self.__dict__)
        fork._own, fork._passed = None, self._passed[:] if passed is None else [passed]
        if passed is None and self._own is not None:
            fork._layout = self._own
        return fork

    def accept(self, tokens: Sequence[int], vocabulary: Vocabulary | None = None, *, at_once: bool = False) -> int:
        """Advance by tokens as far as they may follow. Returns how many.

        Args:
            vocabulary: theirs; None: the matcher has another one, and is asked for texts.
            at_once: whether to ask the matcher for all of them together first, where no places are cached.
        """
        count, guesses = 0, self._guesses if self.by_place else None
        for token in tokens:
            if guesses is None or not (text := guesses.text(token)):
                break
            if (then := self._place.then.get(text)) is not None:
                self._passed.append(text)
            elif (then := self._then(text, token if vocabulary else None)) is None:
                return count
            self._place = then
            count += 1
        if count == len(tokens) or vocabulary is None:
            return count
        rest, (matcher, layout), taken = tokens[count:], self.now(), 0
        if at_once and not self.lost and (text := whole_text(vocabulary, rest)) and matcher.accept_text(text):
            taken = len(rest)
        elif not self.lost:
            allowed = (is_text(vocabulary, token) and matcher.accept_token(token) for token in rest)
            taken = sum(takewhile(bool, allowed))
        layout.follow(text_of(vocabulary, rest[:taken]))
        self._place, self.by_place = self._guesses.place(layout) if self._guesses else Place(), False
        return count + taken

    def step(self) -> Sequence[LikelyText] | None:
        """Advance by text that is forced or likely, and return its pieces; None if there is none."""
        place = self._place
        if place.pieces is None and not self._asked(place):
            return None
        pieces = self._guesses.of_words(place) if place.rests and self._guesses else place.pieces
        if not pieces:
            return None
        then = self._then(pieces[0].text if len(pieces) == 1 else "".join(piece.text for piece in pieces))
        if then is None:
            return None
        self._place = then
        return pieces

    def ends(self) -> bool:
        """Whether the text may end, and nothing is forced."""
        place = self._place
        if place.ends is None:
            matcher, _ = self.now()
            ends = matcher.may_end and not matcher.forced()
            if self.lost or matcher.exhausted():
                return False
            place.ends = ends
        return place.ends

    def now(self) -> tuple[Matcher, Layout]:
        """Advance matcher and layout to the place, and return them."""
        if self._own is None:
            self._own = self._layout.copy()
            self.lost = self.lost or not all(map(self.matcher.accept_token, self._unseen))
            self._unseen = ()
        if self._passed:
            text = "".join(self._passed)
            self._passed.clear()
            self.lost = self.lost or not self.matcher.accept_text(text)
            self._own.follow(text)
        return self.matcher, self._own

    def _asked(self, place: Place) -> bool:
        """Ask the matcher what follows `place`; False if no time is left."""
        matcher, layout = self.now()
        forced, rests = matcher.forced(), dict[str, str]()
        pieces = [LikelyText(forced, Kind.FORCED)] if forced else []
        if not forced and self._guesses is not None:
            known = self._guesses.next(matcher, layout)
            rests, pieces = (known, []) if isinstance(known, dict) else (rests, known)
        if self.lost or matcher.exhausted():
            return False
        place.rests, place.pieces = rests, pieces
        return True

    def _then(self, text: str, token: int | None = None) -> Place | None:
        """Return the place after `text`, which may be a token; None if it is refused or no time is left."""
        place = self._place
        if text in place.then or (place.free and is_plain(text)):
            then = place.then.get(text, place)
            if then is not None:
                self._passed.append(text)
            return then
        matcher, layout = self.now()
        then = None
        if matcher.accept_text(text) if token is None else matcher.accept_token(token):
            layout.follow(text)
            then = self._guesses.place(layout) if self._guesses else Place()
        if self.lost or (then is None and matcher.exhausted()):
            return None
        if len(place.then) >= TEXTS:
            place.then.clear()
        place.then[text] = then
        return then

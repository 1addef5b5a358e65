"""Follows how a JSON text is laid out: blanks are free, but a writer seldom changes its habit in the middle."""

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

from whiflash_sglang.structure.matchers import Matcher

BLANKS = " \t\r\n"

USUAL = {":": " ", ",": " "}
"""Usual blanks after a character, until some are seen: as `json.dumps` writes them. None after other characters."""

INDENTED: Final = "\n\0"
"""Recorded in place of a line break with as many blanks as the depth asks for."""

CLOSING: Final = "}}"
"""Key of `Layout.seen` for a bracket that closes a container that is not empty."""

MARKS = frozenset('{}[]:,"')
"""Characters between which blanks are a habit. Other blanks occur in prose and in numbers."""

ASKED = MARKS.union("el")
"""Characters after which blanks are guessed: `true`, `false` and `null` end with `e` or `l`; a number may go on."""

LONGEST = 32
"""Largest number of blanks in a habit."""

DEEPEST = 64
"""Most open containers of a text that has places: deeper ones are compared by recursion, and Python's ends."""

FREE: Final = "‡"
"""A character that is allowed only where nearly any is: in free text, and inside a string without bounds."""


class Free(NamedTuple):
    """Tokens that continue free text: of whole characters, without any of `leaving`, not ending in one of `ending`, and
    not beginning one of `words`. plain: only those that need no escape in a JSON string.
    """

    leaving: str = ""
    ending: str = ""
    plain: bool = False
    words: tuple[str, ...] = ()


class Frames(NamedTuple):
    """Fixed texts around JSON that is laid out freely: those that begin it and those that end it."""

    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


NO_FRAMES = Frames()


class Copied:
    """A part of a state that is copied to look ahead. Copies share values, so these are replaced, not changed."""

    def copy(self) -> Self:
        """Return a copy with the same values, in a fraction of the time of `copy.copy`."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other


@dataclass
class Layout(Copied):
    """Follows a JSON text character by character and records its blanks.

    frames: texts around the JSON; they are fixed, so their blanks are not recorded. habit: layout of earlier texts, for
    places that were not seen yet.
    inside: whether the text ends inside a string; partial: this string so far. last: the last character that is neither
    blank nor inside a string, closing quotes included. blanks: those after it so far. seen: newest blanks after each
    character; those before a closing bracket are recorded apart (`_place`). It is replaced, never changed in place.
    depth: open brackets. unit: blanks of indentation per bracket.
    words: names and listed values of its schemas, sorted, if `place` determines what may follow; else None. decides:
    whether the values in a container decide what may follow, beside its names.
    """

    inside: bool = False
    partial: str = ""
    last: str = ""
    blanks: str = ""
    seen: dict[str, str] = field(default_factory=dict)
    frames: Frames = NO_FRAMES
    habit: "Layout | None" = None
    depth: int = 0
    unit: int = 0
    words: Sequence[str] | None = None
    decides: bool = True
    _open: tuple[tuple[str, Hashable, Any], ...] = ()
    """Open containers: bracket, key and contents so far of each."""
    _key: Hashable = ""
    _value: Hashable = ""
    """The newest key or value in the innermost container, as far as it is written."""
    _frame: str | None = ""
    """The text that began the open frame; empty before the first one, None behind one that has ended."""
    _since: str | None = None
    """Text since the JSON of the open frame is complete; None while it is not."""
    _seen_so: frozenset[tuple[str, str]] | None = None
    _escaped: int = 0
    """Characters of an escape that are still to come; -1: it has only begun."""
    _tail: str = ""
    _within: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> Hashable:
        """Return a key: two texts with equal keys have the same continuations under their schema. None if unknown.

        Free texts are equal, and so are digits but a leading zero, which no digit follows. An array's items count once
        each, in any order, since nothing in such a schema counts or orders them. Items of an array that is the whole
        text do not count.
        """
        if self.words is None:
            return None
        if self._is_outside:
            return self._frame, self._begun, frozenset(self._within.items())
        if self._seen_so is None:
            self._seen_so = frozenset([item for item in self.seen.items() if ASKED.issuperset(item[0])])
        if self._since is not None:
            return self._frame, self._since, self._seen_so, self.unit
        written = self._listed(self.partial, whole=False) if self.inside else None
        last = "1" if self.last.isdigit() else self.last
        state = last, written, self._escaped, self.blanks, self.unit, self._seen_so
        return self._frame, self._open, self._key, self._value, *state

    @property
    def _is_outside(self) -> bool:
        """Whether the text is outside all frames; never without frames."""
        return self.frames is not NO_FRAMES and not self._frame

    @property
    def _begun(self) -> str:
        """Return the longest end of the text outside frames that may begin one."""
        ends = (self._tail[at:] for at in range(len(self._tail)))
        return next((end for end in ends if any(begin.startswith(end) for begin in self.frames.begins)), "")

    def free(self, matcher: Matcher) -> Free | None:
        """Return the tokens that continue the text if it ends in free text; None if it does not, or if that is unknown.
        matcher: of its grammar, after it.
        """
        if self.words is not None and self._is_outside:
            leaving = "".join({begin[0] for begin in self.frames.begins})
            return Free(leaving) if not self._begun and matcher.allows(FREE) else None
        if self.words is None or not self.inside or self._escaped or self._since is not None:
            return None
        if self._listed(self.partial, whole=False) != self.partial:
            return Free(plain=True)
        begins = not self.partial and matcher.allows(FREE)
        return Free(plain=True, words=tuple(self.words)) if begins else None

    def follow(self, text: str) -> None:
        """Advance by `text`; JSON begins and ends where the frames do."""
        if self.frames is NO_FRAMES:
            self._follow(text)
            return
        whole, done = self._tail + text, len(self._tail)
        begins = {end: frame for frame in sorted(self.frames.begins, key=len) for end in _ends(whole, frame, done)}
        ends = {end for frame in self.frames.ends for end in _ends(whole, frame, done)}
        start = 0
        for place in sorted(begins.keys() | ends):
            self._follow(whole[done:place])
            done = place
            if self.words is not None and not (place in begins if self._is_outside else self._since is not None):
                continue  # a string has this text
            start = place
            if place in begins:
                self.seen, self.inside, self.last, self.blanks = self._within, False, "", ""
                self.depth, self._frame = 0, begins[place]
                self._open, self._key, self._value, self._seen_so = (), "", "", None
            else:
                self._within, self._frame, self._since = self.seen, None, None
        self._follow(whole[done:])
        self._tail = whole[start:][-max(map(len, self.frames.begins + self.frames.ends)) :]

    def blank_before(self, character: str) -> tuple[str, bool]:
        """Return the blanks still expected before JSON's `character`, and whether earlier text shows that spacing."""
        place, depth = _place(self.last, character), self.depth - (character in "]}")
        usual, unit = self.seen.get(place), self.unit
        if usual is None and "\n" in self.seen.get("{", "") and (self.last == "," or place == CLOSING):
            usual = self.seen["{"]  # a writer that begins one key on a new line does so for all
        habit = self.habit  # it applies unless this text is already laid out otherwise
        if usual is None and habit and all(habit.seen.get(key, own) == own for key, own in self.seen.items()):
            usual, unit = habit.seen.get(place), habit.unit
        if usual is None:
            usual = USUAL.get(self.last, "")
        if usual == INDENTED:
            usual = "\n" + " " * (unit * depth)
        left = usual[len(self.blanks) :] if usual.startswith(self.blanks) else ""
        return left, place in self.seen

    def as_habit(self) -> "Layout":
        """Return this text's blanks and indentation, as the layout to expect of later texts of the same kind."""
        seen = (self.seen | self._within).items()
        marks = {place: usual for place, usual in seen if MARKS.issuperset(place) and len(usual) <= LONGEST}
        unusual = {place: usual for place, usual in marks.items() if usual != USUAL.get(place, "")}
        return Layout(seen=unusual, unit=self.unit if INDENTED in unusual.values() else 0)

    def _follow(self, text: str) -> None:
        at, size, complete = 0, len(text), None if self._since is None else 0
        while at < size:
            character = text[at]
            if self.inside and character not in '"\\' and not self._escaped:
                ends = (end for end in (text.find('"', at), text.find("\\", at)) if end >= 0)
                stop = min(ends, default=size)
                self.partial += text[at:stop]
                at = stop
                continue
            at += 1
            if self.inside:
                self._inside(character)
            elif character in BLANKS:
                self.blanks += character
            else:
                self.depth -= character in "]}" and self.depth > 0
                place, blanks = _place(self.last, character), self._indented()
                if self.seen.get(place) != blanks:
                    self.seen, self._seen_so = {**self.seen, place: blanks}, None
                self.depth += character in "[{"
                self.inside, self.partial = character == '"', ""
                self.last, self.blanks = character, ""
                if self.words is not None and not self._is_outside and complete is None:
                    self._mark(character)
                    complete = at if self.frames is not NO_FRAMES and self._open == () and self._value != "" else None
        if complete is not None:
            self._since = (self._since or "") + text[complete:]

    def _mark(self, character: str) -> None:
        """Advance the parts of `place` by a character. Text that is not JSON, such as thoughts, has no places."""
        value, scalar = self._value, character not in '{[":,]}'
        if character in "{[":
            strange = value != "" or len(self._open) == DEEPEST
        elif character == '"':
            strange = value != "" or not self._open
        else:
            strange = not self._open or (scalar and (isinstance(value, tuple) or str(value)[:1] == '"'))
        if strange:
            self.words = None
        elif character == ":":
            self._key, self._value = value, ""
        elif character in "{[":
            self._open, self._key = (*self._open, (character, self._key, ())), ""
        elif scalar:
            character = "1" if character.isdigit() and (character != "0" or value not in ("", "-")) else character
            self._value = value if character == "1" and str(value)[-1:] == "1" else f"{value}{character}"
        elif character != '"':
            *around, (bracket, key, held) = self._open
            if bracket == "[":
                held = frozenset((*held, value)) if self.decides and around and value != "" else ()
            elif value != "":
                item = (self._key, value) if self.decides else self._key
                held = held if item in held else (*held, item)
            if character == ",":
                self._open, self._key, self._value = (*around, (bracket, key, held)), "", ""
            else:
                self._open, self._key, self._value = tuple(around), key, (bracket, held if self.decides else ())

    def _listed(self, text: str, *, whole: bool) -> str:
        """Return `text` if it is a word of the schema or, unless `whole`, begins one; else a mark for free text."""
        words = self.words or ()
        at = bisect_left(words, text)
        listed = at < len(words) and (words[at] == text if whole else words[at].startswith(text))
        return text if listed else "\0"

    def _indented(self) -> str:
        """Return the present `blanks`, or `INDENTED` if they are a line break and the present depth's indentation."""
        line = self.blanks[1:]
        if not self.blanks.startswith("\n") or line.strip(" "):
            return self.blanks
        if self.depth and len(line) % self.depth == 0 and line:
            self.unit = len(line) // self.depth
        return INDENTED if len(line) == self.unit * self.depth else self.blanks

    def _inside(self, character: str) -> None:
        if not self._escaped and character == '"':
            self.inside = False
            if self.words is not None:
                self._value = f'"{self._listed(self.partial, whole=True)}"'
            return
        if self._escaped:
            self._escaped = 4 if self._escaped < 0 and character == "u" else max(self._escaped - 1, 0)
        elif character == "\\":
            self._escaped = -1
        self.partial += character


def _ends(text: str, frame: str, done: int) -> Iterator[int]:
    """Yield the index after each occurrence of `frame` in `text` that ends after the first `done` characters."""
    at = text.find(frame, max(done - len(frame) + 1, 0))
    while at >= 0:
        yield at + len(frame)
        at = text.find(frame, at + 1)


def _place(last: str, character: str) -> str:
    if character not in "]}":
        return last
    return last + "}" if last in "{[" else CLOSING

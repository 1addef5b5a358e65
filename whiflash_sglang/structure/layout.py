"""How a JSON text is laid out, as far as it was written: whitespace is free, but nobody changes it in the middle."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

BLANKS = " \t\r\n"

USUAL = {":": " ", ",": " "}
"""The blanks after a character before anything was seen, as `json.dumps` writes it; nothing after others."""

INDENTED: Final = "\n\0"
"""Record of a line break seen, with as many blanks as the depth asks for."""

CLOSING: Final = "}}"
"""Key of a closing bracket that is not empty, among what was seen."""

MARKS = frozenset('{}[]:,"')
"""Blanks between these are a habit; others occur in prose, and in numbers."""

LONGEST = 32
"""Characters of blanks that may be a habit."""


class Frames(NamedTuple):
    """Texts around JSON that is laid out freely: texts that begin it, and that end it."""

    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


NO_FRAMES = Frames()


class Habit(NamedTuple):
    """How a text was laid out. seen, unit: as of `Layout`."""

    seen: Mapping[str, str]
    unit: int


@dataclass(slots=True)
class Layout:
    """Follows a text character by character.

    frames: around the JSON whose layout it is. Nobody lays them out, so what is seen in them is not kept. habit: how
    earlier texts were laid out, for places that were not seen yet.
    inside: the end of the text is inside a string; `partial` is what was written of it. last: the last character that
    is neither blank nor inside a string, a closing quote among them. blanks: those after it so far. seen: the
    blanks between a character and the next one, the newest of equals; where a bracket closes that counts by itself.
    depth: brackets that are open. unit: blanks that each of them indents by.
    """

    inside: bool = False
    partial: str = ""
    last: str = ""
    blanks: str = ""
    seen: dict[str, str] = field(default_factory=dict)
    frames: Frames = NO_FRAMES
    habit: Habit | None = None
    depth: int = 0
    unit: int = 0
    _escaped: bool = False
    _tail: str = ""
    _within: dict[str, str] = field(default_factory=dict)

    def copy(self) -> "Layout":
        """A copy to look ahead with."""
        return replace(self, seen=dict(self.seen))

    def follow(self, text: str) -> None:
        """Go on with what was written."""
        if self.frames is NO_FRAMES:
            self._follow(text)
            return
        whole, done = self._tail + text, len(self._tail)
        begins = {end for frame in self.frames.begins for end in _ends(whole, frame, done)}
        ends = {end for frame in self.frames.ends for end in _ends(whole, frame, done)}
        for place in sorted(begins | ends):
            self._follow(whole[done:place])
            done = place
            if place in begins:
                self.seen, self.inside, self.last, self.blanks = dict(self._within), False, "", ""
                self.depth = 0
            else:
                self._within = dict(self.seen)
        self._follow(whole[done:])
        self._tail = whole[-max(map(len, self.frames.begins + self.frames.ends)) :]

    def blank_before(self, character: str) -> tuple[str, bool]:
        """Blanks that are still to be written before `character`, and whether such a place was seen."""
        place, depth = _place(self.last, character), self.depth - (character in "]}")
        usual, unit = self.seen.get(place), self.unit
        if usual is None and "\n" in self.seen.get("{", "") and (self.last == "," or place == CLOSING):
            usual = self.seen["{"]  # who writes a key on a line of its own writes all of them so
        if usual is None and (habit := self._usual_habit()) is not None:
            usual, unit = habit.seen.get(place), habit.unit
        if usual is None:
            usual = USUAL.get(self.last, "")
        if usual == INDENTED:
            usual = "\n" + " " * (unit * depth)
        left = usual[len(self.blanks) :] if usual.startswith(self.blanks) else ""
        return left, place in self.seen

    def as_habit(self) -> Habit:
        """Habit for the next text of the kind."""
        seen = self.seen | self._within
        return Habit(
            {
                place: usual
                for place, usual in seen.items()
                if MARKS.issuperset(place) and len(usual) <= LONGEST
            },
            self.unit,
        )

    def _usual_habit(self) -> Habit | None:
        """None where this text is laid out otherwise than earlier ones."""
        habit = self.habit
        if habit is None or any(habit.seen.get(place, usual) != usual for place, usual in self.seen.items()):
            return None
        return habit

    def _follow(self, text: str) -> None:
        for character in text:
            if self.inside:
                self._inside(character)
            elif character in BLANKS:
                self.blanks += character
            else:
                self.depth -= character in "]}" and self.depth > 0
                self.seen[_place(self.last, character)] = self._indented()
                self.depth += character in "[{"
                self.inside, self.partial = character == '"', ""
                self.last, self.blanks = character, ""

    def _indented(self) -> str:
        """The blanks before a character, as they would be at any depth."""
        line = self.blanks[1:]
        if not self.blanks.startswith("\n") or line.strip(" "):
            return self.blanks
        if self.depth and len(line) % self.depth == 0 and line:
            self.unit = len(line) // self.depth
        return INDENTED if len(line) == self.unit * self.depth else self.blanks

    def _inside(self, character: str) -> None:
        if not self._escaped and character == '"':
            self.inside = False
            return
        self._escaped = character == "\\" and not self._escaped
        self.partial += character


def _ends(text: str, frame: str, done: int) -> Iterator[int]:
    """The end of `frame` in `text`, after the first `done` characters."""
    at = text.find(frame, max(done - len(frame) + 1, 0))
    while at >= 0:
        yield at + len(frame)
        at = text.find(frame, at + 1)


def _place(last: str, character: str) -> str:
    if character not in "]}":
        return last
    return last + "}" if last in "{[" else CLOSING

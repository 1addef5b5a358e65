"""How a JSON text is laid out, as far as it was written: whitespace is free, but nobody changes it in the middle."""

from dataclasses import dataclass, field

BLANKS = " \t\r\n"

USUAL = {":": " ", ",": " "}
"""What follows a character before anything was seen, as `json.dumps` writes it; nothing after others."""


@dataclass(slots=True)
class Layout:
    """Follows a text character by character.

    inside: the end of the text is inside a string; `partial` is what was written of it. last: the last character that
    is neither blank nor inside a string, a closing quote among them. blanks: what stood behind it so far. seen: what
    stood between a character and the next one, the newest of equals; where a bracket closes that counts by itself.
    """

    inside: bool = False
    partial: str = ""
    last: str = ""
    blanks: str = ""
    seen: dict[str, str] = field(default_factory=dict)
    _escaped: bool = False

    def copy(self) -> "Layout":
        """To look ahead with."""
        return Layout(self.inside, self.partial, self.last, self.blanks, dict(self.seen), self._escaped)

    def follow(self, text: str) -> None:
        """Go on with what was written."""
        for character in text:
            if self.inside:
                self._inside(character)
            elif character in BLANKS:
                self.blanks += character
            else:
                self.seen[_place(self.last, character)] = self.blanks
                self.inside, self.partial = character == '"', ""
                self.last, self.blanks = character, ""

    def _inside(self, character: str) -> None:
        if not self._escaped and character == '"':
            self.inside = False
            return
        self._escaped = character == "\\" and not self._escaped
        self.partial += character

    def blank_before(self, character: str) -> tuple[str, bool]:
        """Blanks that are still to be written before `character`, and whether such a place was seen."""
        place = _place(self.last, character)
        usual = self.seen.get(place)
        if usual is None:
            opening = self.seen.get("{", "")  # who writes a key on a line of its own writes all of them so
            usual = opening if self.last == "," and "\n" in opening else USUAL.get(self.last, "")
        left = usual[len(self.blanks) :] if usual.startswith(self.blanks) else ""
        return left, place in self.seen


def _place(last: str, character: str) -> str:
    return last + "}" if character in "]}" else last

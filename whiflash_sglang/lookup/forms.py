"""Emission forms: text of the prompt as it would be written again, to copy from.

An agent that opened a file writes it again in another dress: escaped, where the arguments of a tool call quote it,
without the line numbers of the listing that it read, behind the prefixes of a diff, indented otherwise. Its tokens
are then others, so nothing of it matches. The open span shows which dress a text is written in (AgSpec,
arXiv 2610.01108, indexes opened files in several forms; here forms are chosen by the open span, and of the whole
prompt), and the line that is being written shows the prefix of its lines.

Engine-free: the tokenizer is a function from text to token ids. Only what is being quoted is tokenised: the last few
characters that were written are looked for in what the prompt says, and a window around their place is indexed.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

from whiflash_sglang.lookup.index import GAP, SuffixIndex
from whiflash_sglang.lookup.readings import STEP, Reading, meant, readings

Encode = Callable[[str], Sequence[int]]

READ = 1 << 19
"""Characters of a prompt that are read, its newest pieces first."""

SHORTEST = 64
"""Characters that a piece counts as at least: short ones cost something too."""

NEEDLE = 8
"""Characters that must have been written before they are looked for."""

LONG_NEEDLE = 24
"""Characters that are looked for first: of many places that end alike they identify the right one."""

HITS = 4
"""Readings in which a place is looked at in one call."""

WINDOW = 2048
"""Characters that are tokenised where they are found, and at most in one call."""

AHEAD = 256
"""A place nearer than this to the end of what is tokenised there has the next window tokenised."""

_LEAD = re.compile(r"[ \t]*(?:[-+><#*|/]+[ \t]*)?")
"""Possible prefixes of a line: its indent, the mark of a diff, a quotation, a comment."""

_NUMBER = re.compile(r"( *)([1-9]\d{0,5})([:|\t→-]\t?)")
"""Before that, in a listing: the line's number."""


def escaped(text: str) -> str:
    """As inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


class Numbers(NamedTuple):
    """The numbers of a listing.

    first: of the source's first line. width: characters that they are aligned to. mark: the text after them.
    """

    first: int
    width: int
    mark: str

    def before(self, line: int) -> str:
        """What the source's line `line`, counted from 0, begins with."""
        return f"{self.first + line:{self.width}}{self.mark}"


class Dress(NamedTuple):
    """How a text is written again.

    inside_json: inside a JSON string. remove, add: the prefix of its lines in the prompt, and the new one.
    numbers: the numbers before that prefix, if it is listed.
    """

    inside_json: bool
    remove: str = ""
    add: str = ""
    numbers: Numbers | None = None

    def on(self, text: str, first: int = 0) -> str:
        """The text in it, which begins with the source's line `first`."""
        if self.remove or self.add:
            text = "\n".join(map(self._line, text.split("\n")))
        if self.numbers is not None:
            lines = enumerate(text.split("\n"), first)
            text = "\n".join(self.numbers.before(line) + rest for line, rest in lines)
        return escaped(text) if self.inside_json else text

    def _line(self, line: str) -> str:
        rest = line.removeprefix(self.remove)
        return self.add + rest if rest.strip() else (self.add + rest).rstrip()


class Written:
    """The end of what was written, and the line that is being written.

    Args:
        text: as it is meant, not as it is quoted.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        line = text[text.rfind("\n") + 1 :]
        self._number = number = _NUMBER.match(line) if "\n" in text else None
        lead = _LEAD.match(line, number.end() if number else 0)
        assert lead is not None, "it may be empty"
        self._lead = lead[0] if "\n" in text else None
        self._content = line[lead.end() :]

    @property
    def needles(self) -> Iterator[str]:
        """What to look for, the surest first: with the line's prefix, without it, and a few characters."""
        found = (self._text[-LONG_NEEDLE:], self._content[-LONG_NEEDLE:], self._text[-NEEDLE:])
        return (needle for needle in dict.fromkeys(found) if len(needle) >= NEEDLE and not needle.isspace())

    def dress(self, text: str, place: int, needle: str, *, inside_json: bool) -> Dress:
        """How `text`, which has `needle` at `place`, is being written."""
        behind = len(self._content) - len(needle)
        begin = place - behind
        if self._lead is None or begin < 0 or text[begin:place] != self._content[: max(behind, 0)]:
            return Dress(inside_json)
        lead = text[text.rfind("\n", 0, begin) + 1 : begin]
        if not _LEAD.fullmatch(lead):
            return Dress(inside_json)
        pairs = zip(reversed(lead), reversed(self._lead), strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        remove, add = lead[: len(lead) - same], self._lead[: len(self._lead) - same]
        if self._number is None:
            return Dress(inside_json, remove, add)
        blank, number, mark = self._number.groups()
        first = int(number) - text.count("\n", 0, begin)
        return Dress(inside_json, remove, add, Numbers(first, len(blank + number), mark))


class _Source:
    """A reading, and the stretches of it that are tokenised in each dress."""

    __slots__ = ("_covered", "reading")

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self._covered: dict[Dress, list[tuple[int, int]]] = {}

    def missing(self, place: int, dress: Dress) -> bool:
        """Whether what follows `place` is still to be tokenised."""
        if dress == Dress(dress.inside_json) and self.reading.stands(inside_json=dress.inside_json):
            return False
        covered, length = self._covered.get(dress, ()), len(self.reading.text)
        return not any(begin <= place and (end == length or place + AHEAD <= end) for begin, end in covered)

    def window(self, place: int, dress: Dress) -> str:
        """From the beginning of the line that holds `place`, if it is near; empty if the prompt has it in this form."""
        text = self.reading.text
        begin = text.rfind("\n", 0, place) + 1
        begin = begin if place - begin <= WINDOW // 2 else place
        end = min(begin + WINDOW, len(text))
        self._covered.setdefault(dress, []).append((begin, end))
        dressed = dress.on(text[begin:end], text.count("\n", 0, begin) if dress.numbers else 0)
        return "" if self.reading.plain and dressed == text[begin:end] else dressed


class Forms:
    """Of one request's prompt.

    Args:
        encode: text → token ids, without special tokens. pieces: of the prompt, the newest first; asked for one by one.
            budget: tokens that the indexes hold at most, gaps aside.

    Attributes:
        tokens: that the indexes hold. read: characters of the prompt that were read.
    """

    def __init__(self, encode: Encode, pieces: Iterator[str], budget: int) -> None:
        self._encode, self._budget = encode, budget
        self._pieces = pieces
        self._sources: list[_Source] = []
        self._index = {inside_json: SuffixIndex(growing=False) for inside_json in (False, True)}
        self.tokens = self.read = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the indexes."""
        return sum(index.nbytes for index in self._index.values())

    def text(self, written: str, *, inside_json: bool) -> SuffixIndex:
        """What to copy from next; bounded work.

        Args:
            written: the end of what was written. inside_json: whether what follows is quoted in JSON strings.
        """
        self._read_on()
        end = Written(meant(written) if inside_json else written)
        for needle in end.needles:
            if self._seek(end, needle, inside_json):
                break
        return self._index[inside_json]

    def _read_on(self) -> None:
        until = min(self.read + STEP, READ)
        while self.read < until:
            piece = next(self._pieces, None)
            if piece is None:
                break
            piece = piece[-(READ - self.read) :]
            if len(piece) >= NEEDLE:
                self._sources += map(_Source, readings(piece))
            self.read += max(len(piece), SHORTEST)

    def _seek(self, end: Written, needle: str, inside_json: bool) -> bool:
        """Whether `needle` is in the prompt; the window after it is tokenised if it was not yet."""
        hits = 0
        for source in self._sources:
            place = source.reading.text.rfind(needle)
            if place < 0:
                continue
            hits += 1
            dress = end.dress(source.reading.text, place, needle, inside_json=inside_json)
            if source.missing(place + len(needle), dress) and self.tokens < self._budget:
                window = source.window(place, dress)
                tokens = self._encode(window)[: self._budget - self.tokens] if window else ()
                self.tokens += len(tokens)
                self._index[inside_json].extend((*tokens, GAP) if tokens else ())
                return True
            if hits == HITS:
                break
        return hits > 0

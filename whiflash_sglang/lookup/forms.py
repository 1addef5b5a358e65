"""Emission forms: text of the prompt as it would be written again, to copy from.

An agent that opened a file writes it again in another dress: escaped, where the arguments of a tool call quote it,
without the line numbers of the listing that it read, behind the prefixes of a diff, indented otherwise. Its tokens
are then others, so nothing of it matches. What is open where text is written tells which dress it wears (AgSpec,
arXiv 2610.01108, indexes opened files in several forms; here forms are chosen by the open span, and of the whole
prompt).

Engine-free: the tokenizer is a function from text to token ids. Only what is being quoted is tokenised: the last few
characters that were written are looked for in the forms' text, and a window around where they stand is indexed.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from whiflash_sglang.lookup.index import GAP, SuffixIndex

Encode = Callable[[str], Sequence[int]]

READ = 1 << 20
"""Characters of a prompt that have forms, its newest pieces first."""

STEP = 1 << 16
"""Characters of it that are brought into their forms in one call, unless one piece is longer."""

NEEDLE = 8
"""Characters that must have been written before they are looked for."""

LONG_NEEDLE = 24
"""Characters that are looked for first: of many places that end alike they tell the right one."""

HITS = 4
"""Forms in which a place is looked at in one call."""

WINDOW = 2048
"""Characters that are tokenised where they are found, and at most in one call."""

AHEAD = 256
"""A place nearer than this to the end of what is tokenised there has the next window tokenised."""

BUDGET = 1 << 17
"""Characters that are tokenised for one request in all, and so the most tokens that its indexes hold, gaps aside."""

_NUMBERED = re.compile(r"^[ \t]*\d+[:|\t→-]\t?", re.MULTILINE)
"""Line numbers as `grep -n`, `cat -n` and editors of agents print them."""

_DIFFED = re.compile(r"^[+ -](?![+-]{2} )", re.MULTILINE)
_HUNK = re.compile(r"^@@ .* @@", re.MULTILINE)
_ESCAPED = re.compile(r'\\[n"\\t]')


def escaped(text: str) -> str:
    """As inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def unescaped(text: str) -> str | None:
    """The strings inside a JSON document, or what JSON's escapes stand for; None: it holds none."""
    if not _ESCAPED.search(text):
        return None
    try:
        values = [json.loads(text)]
    except (ValueError, RecursionError):
        return text.replace("\\n", "\n").replace("\\t", "\t").replace('\\"', '"').replace("\\\\", "\\")
    strings: list[str] = []
    while values:
        value = values.pop()
        if isinstance(value, str):
            strings.append(value)
        elif isinstance(value, dict | list):
            values += reversed(list(value.values()) if isinstance(value, dict) else value)
    return "\n".join(strings)


def unnumbered(text: str) -> str | None:
    """Without the line numbers of a listing; None: most lines have none."""
    if 2 * len(_NUMBERED.findall(text)) <= text.count("\n"):
        return None
    return _NUMBERED.sub("", text)


def undiffed(text: str) -> str | None:
    """Lines of a unified diff without their prefixes; None: it is none."""
    return _DIFFED.sub("", text) if _HUNK.search(text) else None


def dedented(text: str) -> str | None:
    """Without what all lines are indented by; None: nothing."""
    lines = [line for line in text.split("\n") if line.strip()]
    indent = min((len(line) - len(line.lstrip(" ")) for line in lines), default=0)
    return "\n".join(line[indent:] for line in text.split("\n")) if indent else None


def read(piece: str, *, as_said: bool) -> Iterator[str]:
    """What a piece of the prompt says: without line numbers or a diff's prefixes; strings inside JSON. as_said: those
    too that are read no other way, and the piece without its indent.
    """
    inner = unescaped(piece)
    if inner is not None and as_said:
        yield inner
    for text in (piece, inner):
        for stripped in (unnumbered, undiffed):
            found = None if text is None else stripped(text)
            if found is not None:
                yield found
    if as_said and (found := dedented(piece)) is not None:
        yield found


def forms(piece: str, *, inside_json: bool) -> list[str]:
    """A piece as it would be written again, none twice, never as it stands in the prompt: that is indexed already."""
    if inside_json:
        # What is read without its prefixes is quoted without them more often than with them.
        written = [escaped(text) for text in (*read(piece, as_said=False), piece)]
    else:
        written = list(read(piece, as_said=True))
    return [text for text in dict.fromkeys(written) if text != piece]


def pieces_of(prompt: Iterable[int], token_bytes: Sequence[bytes], special: frozenset[int]) -> list[str]:
    """A prompt's text between its special tokens: messages, where a chat template wrote it."""
    pieces, piece = [], bytearray()
    for token in prompt:
        if token in special:
            pieces.append(piece)
            piece = bytearray()
        elif 0 <= token < len(token_bytes):
            piece += token_bytes[token]
    pieces.append(piece)
    return [text.decode(errors="replace") for text in pieces if len(text) >= NEEDLE]


class _Form:
    """One text, and the stretches of it that are tokenised."""

    __slots__ = ("covered", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.covered: list[tuple[int, int]] = []

    def missing(self, place: int) -> bool:
        """Whether what follows `place` is still to be tokenised."""
        return not any(
            begin <= place and (end == len(self.text) or place + AHEAD <= end) for begin, end in self.covered
        )

    def window(self, place: int) -> str:
        """From the beginning of the line that holds `place`, where it is near."""
        ends = ((self.text.rfind(end, 0, place), len(end)) for end in ("\n", "\\n"))
        begin = max((at + length for at, length in ends if at >= 0), default=0)
        begin = begin if place - begin <= WINDOW // 2 else place
        self.covered.append((begin, begin + WINDOW if begin + WINDOW < len(self.text) else len(self.text)))
        return self.text[begin : begin + WINDOW]


class Forms:
    """Of one request's prompt.

    Args:
        encode: text → token ids, without special tokens. pieces: of the prompt, in their order.

    Attributes:
        tokenised: characters that were tokenised. transformed: characters that were brought into their forms.
    """

    def __init__(self, encode: Encode, pieces: Sequence[str]) -> None:
        self._encode = encode
        self._pieces = pieces
        self._waiting = {inside_json: len(pieces) for inside_json in (False, True)}
        self._read = dict.fromkeys((False, True), 0)
        self._forms: dict[bool, list[_Form]] = {False: [], True: []}
        self._index = {inside_json: SuffixIndex(growing=False) for inside_json in (False, True)}
        self.tokenised = self.transformed = 0

    def texts(self, written: str, kind: str | None) -> Sequence[SuffixIndex]:
        """Texts to copy from next.

        Args:
            written: the end of what was written. kind: of the open span; in a `tool_call` or `json` text stands
                inside JSON strings.
        """
        inside_json = kind in ("tool_call", "json")
        self._transform(inside_json)
        for needle in (written[-LONG_NEEDLE:], written[-NEEDLE:]):
            if len(needle) >= NEEDLE and not needle.isspace() and self._seek(needle, inside_json):
                break
        return (self._index[inside_json],)

    def _transform(self, inside_json: bool) -> None:
        done = 0
        while self._waiting[inside_json] and done < STEP and self._read[inside_json] < READ:
            self._waiting[inside_json] -= 1
            piece = self._pieces[self._waiting[inside_json]][: READ - self._read[inside_json]]
            self._forms[inside_json] += map(_Form, forms(piece, inside_json=inside_json))
            done += len(piece)
            self._read[inside_json] += len(piece)
        self.transformed += done

    def _seek(self, needle: str, inside_json: bool) -> bool:
        """Whether `needle` stands in a form; a window behind it is tokenised where none was."""
        hits = 0
        for form in self._forms[inside_json]:
            place = form.text.rfind(needle)
            if place < 0:
                continue
            hits += 1
            if form.missing(place + len(needle)) and self.tokenised + WINDOW <= BUDGET:
                window = form.window(place)
                self.tokenised += len(window)
                self._index[inside_json].extend((*self._encode(window), GAP))
                return True
            if hits == HITS:
                break
        return hits > 0

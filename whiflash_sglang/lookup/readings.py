"""What the messages of a prompt say, whatever they came in: listings and diffs without prefixes, strings inside JSON.

Engine-free. Readings are plain text; how they would be written again is `lookup.forms`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

STEP = 1 << 14
"""Bytes that a piece has, and as many again at most."""

_NUMBERED = re.compile(r"^[ \t]*\d+[:|\t→-]\t?", re.MULTILINE)
"""Line numbers as `grep -n`, `cat -n` and editors of agents print them."""

_DIFFED = re.compile(r"^[+ -](?![+-]{2} )", re.MULTILINE)
_HUNK = re.compile(r"^@@ .* @@", re.MULTILINE)
_ESCAPED = re.compile(r'\\[n"\\t]')
_ESCAPE = re.compile(r'\\(?:(["\\/bfnrt])|u([0-9a-fA-F]{4}))')
_MEANT = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class Reading(NamedTuple):
    """text: what is said. plain, quoted: whether it stands in the prompt as it would be written outside of JSON
    strings, and inside of them, so that it is found there.
    """

    text: str
    plain: bool = False
    quoted: bool = False

    def stands(self, *, inside_json: bool) -> bool:
        """Whether copying the prompt is enough."""
        return self.quoted if inside_json else self.plain


def readings(piece: str) -> list[Reading]:
    """Of a piece of the prompt: what is said without its prefixes first, since it is said again without them more often
    than with them; the piece itself last.
    """
    inner = unescaped(piece)
    found: dict[str, Reading] = {}
    for text in (piece, inner):
        for stripped in (unnumbered, undiffed):
            read = None if text is None else stripped(text)
            if read is not None:
                found.setdefault(read, Reading(read))
    if inner is not None:
        found.setdefault(inner, Reading(inner, quoted=True))
    found.setdefault(piece, Reading(piece, plain=True))
    return list(found.values())


def meant(quoted: str) -> str:
    """What text inside a JSON string stands for; an escape that is not complete stays as it is."""
    return _ESCAPE.sub(
        lambda found: chr(int(found[2], 16)) if found[2] else _MEANT.get(found[1], found[1]), quoted
    )


def unescaped(text: str) -> str | None:
    """The strings inside a JSON document, or what JSON's escapes stand for; None: it holds none."""
    if not _ESCAPED.search(text):
        return None
    try:
        values = [json.loads(text)]
    except (ValueError, RecursionError):
        return meant(text)
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


def pieces_of(prompt: Sequence[int], token_bytes: Sequence[bytes], special: frozenset[int]) -> Iterator[str]:
    """A prompt's text between its special tokens (messages, where a chat template wrote it), the newest first.

    A piece has some `STEP` bytes at most: a longer one is parted before a line, where one begins soon. So each costs
    bounded work, when it is asked for.
    """
    parts: list[bytes] = []
    size = 0
    for token in reversed(prompt):
        own = token_bytes[token] if 0 <= token < len(token_bytes) and token not in special else b""
        parts.append(own)
        size += len(own)
        long = size >= STEP and (b"\n" in own or size >= 2 * STEP)
        if long or token in special or len(parts) >= 2 * STEP:
            yield b"".join(reversed(parts)).decode(errors="replace")
            parts, size = [], 0
    yield b"".join(reversed(parts)).decode(errors="replace")

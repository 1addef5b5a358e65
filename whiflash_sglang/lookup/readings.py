"""The texts of a prompt's messages, whatever they came in: listings and diffs without prefixes, strings inside JSON.

Engine-free. Readings are plain text; how they would be written again is `lookup.forms`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from whiflash_sglang.jsonl import read_json

STEP = 1 << 14
"""Bytes that a piece has, and as many again at most."""

_NUMBERED = re.compile(r"^[ \t]*\d+[:|\t→-]\t?", re.MULTILINE)
"""Line numbers as `grep -n`, `cat -n` and editors of agents print them."""

_DIFFED = re.compile(r"^[+ -](?![+-]{2} )", re.MULTILINE)
_HUNK = re.compile(r"^@@ .* @@", re.MULTILINE)
_ESCAPED = re.compile(r'\\[n"\\t]')
_ESCAPE = re.compile(
    r'\\(?:(["\\/bfnrt])|u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})'
    r"|u(?![dD][89a-fA-F])([0-9a-fA-F]{4}))"
)
_MEANT = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class Reading(NamedTuple):
    """text: what is said. plain, quoted: whether the prompt has it as it would be written outside of JSON
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
    """The text that a piece of a JSON string encodes. An incomplete escape, such as half of an emoji, stays."""
    return _ESCAPE.sub(_character, quoted)


def _character(escape: re.Match[str]) -> str:
    short, high, low, other = escape.groups()
    if high:  # two escapes of UTF-16, one character
        return bytes.fromhex(high + low).decode("utf-16-be")
    return chr(int(other, 16)) if other else _MEANT.get(short, short)


def unescaped(text: str) -> str | None:
    """The strings inside a JSON document, or the text that JSON's escapes denote; None: it holds none."""
    if not _ESCAPED.search(text):
        return None
    try:
        values = [read_json(text, finite=False)]
    except ValueError:
        return meant(text)
    strings: list[str] = []
    while values:
        value = values.pop()
        if isinstance(value, str):
            strings.append(value)
        elif isinstance(value, dict | list):
            values += reversed(list(value.values()) if isinstance(value, dict) else value)
    # No tokenizer takes a lone surrogate, which JSON can say.
    return "\n".join(strings).encode(errors="replace").decode()


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

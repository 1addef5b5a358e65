"""The text of a file in a tool's view of it: without numbers of lines, headers and footers."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Final

_NUMBER: Final = re.compile(r" *L?(\d+) ?(\t|→|:|\||│)")
"""Before every line: `cat -n` and `nl` (tab), Claude Code (arrow), SWE-agent (colon), OpenHands (bar), bat (box)."""
_BLANK_FOLLOWS: Final = (":", "|", "│")
"""Some tools write a blank after these."""
_HEADER: Final = re.compile(r"^\[File: (.+?) \(\d+ lines total\)\]\r?$", re.MULTILINE)
_AROUND: Final = re.compile(
    r"\[File: .*\]|\(\d+ more lines (above|below)\)|\(Open file: .*\)|\(Current directory: .*\)|bash-\$|"
    r"\(this is the (beginning|end) of the file\)|\(End of file\b.*\)|"
    r"Here's the result of running `cat -n` on .*|--- FILE CONTENT.*---|</?(file|content|file_content|output)\b[^>]*>"
)
"""Whole lines above and below a file."""
_REMINDER: Final = re.compile(r"\n+<system-reminder>.*?</system-reminder>\s*\Z", re.DOTALL)
_ELEMENT: Final = re.compile(r"\s*<(file|content|file_content|output)\b[^>\n]*>\n(.*?)\n?</\1>\s*", re.DOTALL)
_FENCE: Final = re.compile(r"(?:[^\n]*\n){0,2}```[^\n`]*\n(.*?)\n?```\s*", re.DOTALL)
_FENCES_ITSELF: Final = (".md", ".mdx", ".rst", ".txt")


def file_named(shown: str) -> str:
    """The path that a view's header names; empty without one."""
    found = _HEADER.search(shown)
    return found[1] if found else ""


def file_shown(shown: str, path: str, *, numbered: bool = False) -> str | None:
    """The file's lines in a tool's result; None if it is not clear which these are.

    numbered: results without numbers of lines are no views, as an edit's are.
    """
    shown = _REMINDER.sub("\n", shown)
    lines = shown.split("\n")
    found = {place: match for place, line in enumerate(lines) if (match := _NUMBER.match(line))}
    sign = Counter(match[2] for match in found.values()).most_common(1)
    found = {place: match for place, match in found.items() if match[2] == sign[0][0]}
    if not _is_view(lines, found):
        return None if numbered else _unframed(shown, path)
    for (place, match), (next_place, next_match) in pairwise(found.items()):
        step = int(next_match[1]) - int(match[1])
        if step < 1 or (step == 1) != (next_place == place + 1):
            return None  # results of a search, two views, or lines that were wrapped
    texts = [lines[place][match.end() :].removesuffix("\r") for place, match in found.items()]
    if sign[0][0] in _BLANK_FOLLOWS and _indent(texts) % 2:
        texts = [text.removeprefix(" ") for text in texts]
    return "\n".join(texts) + ("\n" if max(found) + 1 < len(lines) else "")


def _is_view(lines: list[str], found: dict[int, re.Match[str]]) -> bool:
    """Whether the numbers are a view's: something around them is, or most lines have one."""
    if any(_AROUND.fullmatch(line.strip()) for place, line in enumerate(lines) if place not in found):
        return bool(found)
    if len(found) == 1 and not _counts(next(iter(found.values()))):
        return False
    return 2 * len(found) > sum(bool(line.strip()) for line in lines)


def _counts(match: re.Match[str]) -> bool:
    """Whether one line's number is one: `12:30` begins with none."""
    return match[1] == "1" or match[2] not in _BLANK_FOLLOWS


def _indent(texts: list[str]) -> int:
    """Blanks before every line: an odd number of them includes one that is not the file's."""
    return min((len(text) - len(text.lstrip(" ")) for text in texts if text.strip()), default=0)


def _unframed(shown: str, path: str) -> str:
    """A file without numbers: what an element, a fence, or lines above and below it frame."""
    framed = _ELEMENT.fullmatch(shown)
    if framed:
        return framed[2] + "\n"
    fenced = None if path.endswith(_FENCES_ITSELF) else _FENCE.fullmatch(shown)
    if fenced:
        return fenced[1] + "\n"
    lines = shown.splitlines(keepends=True)
    while lines and _AROUND.fullmatch(lines[0].strip()):
        del lines[0]
    while lines and _AROUND.fullmatch(lines[-1].strip()):
        del lines[-1]
    return "".join(lines)

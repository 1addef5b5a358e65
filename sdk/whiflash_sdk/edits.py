"""Files that a request's conversation shows: read from its body, of any route, whatever a tool puts around them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Final

from whiflash_sdk.presets import MARKUP_ARGUMENTS
from whiflash_sdk.reading import json_or_none, text_or_none

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


_PATHS: Final = ("path", "file_path", "filepath", "filename", "file", "target_file", "absolute_path")
_CONTENTS: Final = ("content", "contents", "file_text", "new_content", "text")
_OLD: Final = ("old_string", "old_str", "old_text", "search")
_NEW: Final = ("new_string", "new_str", "new_text", "replace")
_EDITS: Final = re.compile(r"edit|write|patch|replace|update", re.IGNORECASE)
_SEARCHES: Final = ("pattern", "query", "regex", "glob")


def file_to_edit(body: Mapping[str, Any], parser: str | None) -> str | None:
    """The file that was read or written last, as a call writes it, if the request offers a tool that edits.

    parser: the server's parser of tool calls: most write a file as a JSON string, some as it is.
    """
    if not _offers_edits(body):
        return None
    files: dict[str, str] = {}
    calls: dict[str, tuple[str, bool]] = {}
    for message in _messages(body):
        for name, arguments in _calls(message):
            path = _first(arguments, _PATHS)
            if path and not _first(arguments, _SEARCHES):
                calls[name] = path, _follow(files, path, arguments)
        for name, shown in _results(message):
            path, is_edit = calls.pop(name, ("", True))
            known, path = path in files, path or file_named(shown)
            text = file_shown(shown, path, numbered=is_edit) if path and not known else None
            if text:  # else what was edited since is known better
                files.pop(path, None)
                files[path] = text
    if not files:
        return None
    text = files[next(reversed(files))]
    return text if parser in MARKUP_ARGUMENTS else json.dumps(text, ensure_ascii=False)[1:-1]


def _follow(files: dict[str, str], path: str, arguments: Mapping[str, Any]) -> bool:
    """Keep what a call makes of the file that it names: of one that reads it, nothing is known before its result.

    Returns: whether it is an edit.
    """
    known = files.pop(path, None)
    written, old, new = (_first(arguments, names) for names in (_CONTENTS, _OLD, _NEW))
    if written:
        files[path] = written
    elif old and known is not None:
        files[path] = known.replace(old, new, 1)
    return bool(written or old or new)


def _offers_edits(body: Mapping[str, Any]) -> bool:
    tools = body.get("tools")
    if body.get("tool_choice") == "none" or not isinstance(tools, list):
        return False
    described = [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)]
    return any(
        _EDITS.search(text_or_none(one.get("name")) or "") for one in described if isinstance(one, Mapping)
    )


def _messages(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = body.get("messages", body.get("input"))
    if isinstance(found, str):
        return [{"role": "user", "content": found}]
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _blocks(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The message and the parts of its content: each route has its calls and results somewhere among these."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return [message, *(part for part in parts if isinstance(part, Mapping))]


def _calls(message: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Ids and arguments of the tools that it calls."""
    called = message.get("tool_calls")
    for call in called if isinstance(called, list) else _blocks(message):
        if isinstance(call, Mapping):
            function = call.get("function")
            given = function.get("arguments") if isinstance(function, Mapping) else call.get("arguments")
            given = call.get("input") if call.get("type") == "tool_use" else given
            arguments = json_or_none(given) if isinstance(given, str) else given
            if isinstance(arguments, Mapping):
                yield text_or_none(call.get("call_id", call.get("id"))) or "", arguments


def _results(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Ids of the calls that it answers, and what these brought."""
    found = []
    for block in _blocks(message):
        if block.get("role") == "tool":
            found.append((block.get("tool_call_id"), block.get("content")))
        elif block.get("type") == "tool_result":
            found.append((block.get("tool_use_id"), "" if block.get("is_error") else block.get("content")))
        elif block.get("type") == "function_call_output":
            found.append((block.get("call_id"), block.get("output")))
    return [(text_or_none(name) or "", _plain(content)) for name, content in found]


def _plain(content: object) -> str:
    """The text of a result."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(text_or_none(part.get("text")) or "" for part in parts if isinstance(part, Mapping))


def _first(arguments: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((arguments[name] for name in names if isinstance(arguments.get(name), str)), "")

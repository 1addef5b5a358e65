"""Reconstructs the file that an agent is about to edit from the tool calls and results in a request's body."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import Any, Final, NamedTuple

from whiflash_sdk.presets import MARKUP_ARGUMENTS
from whiflash_sdk.reading import json_or_none, text_or_none

_NUMBER: Final = re.compile(r" *L?(\d{1,9}) ?(\t|→|:|\||│)")
"""Line numbers of `cat -n` and `nl` (tab), Claude Code (arrow), SWE-agent (colon), OpenHands (bar), bat (box)."""
_BLANK_FOLLOWS: Final = (":", "|", "│")
"""Separators after which some tools write a blank."""
_HEADER: Final = re.compile(r"^\[File: (.+?) \(\d+ lines total\)\]\r?$", re.MULTILINE)
_AROUND: Final = re.compile(
    r"\[File: .*\]|\(\d+ more lines (above|below)\)|\(Open file: .*\)|\(Current directory: .*\)|bash-\$|"
    r"\(this is the (beginning|end) of the file\)|\(End of file\b.*\)|"
    r"Here's the result of running `cat -n` on .*|--- FILE CONTENT.*---|</?(file|content|file_content|output)\b[^>]*>"
)
"""Whole lines that tools write above and below a file."""
_REMINDER: Final = ("\n<system-reminder>", "</system-reminder>")
_ELEMENT: Final = re.compile(r"\s*<(file|content|file_content|output)\b[^>\n]*>\n(.*?)\n?</\1>\s*", re.DOTALL)
_FENCE: Final = re.compile(r"(?:[^\n]*\n){0,2}```[^\n`]*\n(.*?)\n?```\s*", re.DOTALL)
_FENCES_ITSELF: Final = (".md", ".mdx", ".rst", ".txt")


def file_shown(shown: str, path: str, *, numbered: bool = False) -> str | None:
    """Extract a file's text from a tool's result; None if it is not clear which lines are the file's.

    numbered: accept results with line numbers only, as for edits, whose results may be a message.
    """
    if shown.rstrip().endswith(_REMINDER[1]) and _REMINDER[0] in shown:
        shown = shown.partition(_REMINDER[0])[0].rstrip("\n") + "\n"
    lines = shown.split("\n")
    matches = {place: match for place, line in enumerate(lines) if (match := _NUMBER.match(line))}
    sign = Counter(match[2] for match in matches.values()).most_common(1)
    matches = {place: match for place, match in matches.items() if match[2] == sign[0][0]}
    if not _is_view(lines, matches):
        return None if numbered else _unframed(shown, path)
    for (place, match), (next_place, next_match) in pairwise(matches.items()):
        step = int(next_match[1]) - int(match[1])
        if step < 1 or (step == 1) != (next_place == place + 1):
            return None  # results of a search, two views, or lines that were wrapped
    texts = [lines[place][match.end() :].removesuffix("\r") for place, match in matches.items()]
    if sign[0][0] in _BLANK_FOLLOWS and _indent(texts) % 2:
        texts = [text.removeprefix(" ") for text in texts]
    return "\n".join(texts) + ("\n" if max(matches) + 1 < len(lines) else "")


def _is_view(lines: list[str], numbered: dict[int, re.Match[str]]) -> bool:
    """Whether `lines` are a numbered view of a file: a tool's header or footer is among them, or most have a number."""
    if any(_AROUND.fullmatch(line.strip()) for place, line in enumerate(lines) if place not in numbered):
        return bool(numbered)
    if len(numbered) == 1 and (only := next(iter(numbered.values())))[1] != "1" and only[2] in _BLANK_FOLLOWS:
        return False  # such as the time `12:30`
    return 2 * len(numbered) > sum(bool(line.strip()) for line in lines)


def _indent(texts: list[str]) -> int:
    """Return the number of blanks before every line. An odd number includes one that the tool wrote."""
    return min((len(text) - len(text.lstrip(" ")) for text in texts if text.strip()), default=0)


def _unframed(shown: str, path: str) -> str:
    """Extract a file without line numbers from the element, the fence, or the lines above and below that frame it."""
    framed = _ELEMENT.fullmatch(shown)
    if framed:
        return framed[2] + "\n"
    fenced = None if path.endswith(_FENCES_ITSELF) else _FENCE.fullmatch(shown)
    if fenced:
        return fenced[1] + "\n"
    lines = shown.splitlines(keepends=True)
    first, last = 0, len(lines)
    while first < last and _AROUND.fullmatch(lines[first].strip()):
        first += 1
    while first < last and _AROUND.fullmatch(lines[last - 1].strip()):
        last -= 1
    return "".join(lines[first:last])


_PATHS: Final = ("path", "file_path", "filepath", "filename", "file", "target_file", "absolute_path")
_CONTENTS: Final = ("content", "contents", "file_text", "new_content", "text")
_OLD: Final = ("old_string", "old_str", "old_text", "search")
_NEW: Final = ("new_string", "new_str", "new_text", "replace")
_EDITS: Final = re.compile(r"edit|write|patch|replace|update", re.IGNORECASE)
_SEARCHES: Final = ("pattern", "query", "regex", "glob")


_ANSWERS: Final = {
    "tool": ("tool_call_id", "content"),
    "tool_result": ("tool_use_id", "content"),
    "function_call_output": ("call_id", "output"),
}
"""Fields of a tool result that hold the call's id and the content, by its role or type."""
_LOOKED_AT: Final = 1024
"""Most messages, parts and calls that are read, from the end, so that a long conversation does not cost more a turn."""
_LONGEST: Final = 2**18
"""Most characters of a file or result that are read: more than a server takes of a prediction."""


def file_to_edit(body: Mapping[str, Any], parser: str | None) -> str | None:
    """Return the file that was read or written last, as a tool call would write it; None without a tool for edits.

    parser: the server's parser of tool calls: most formats write a file as a JSON string, some as it is.
    """
    text = _last_file(_touches(islice(_parts(body), _LOOKED_AT))) if _offers_edits(body) else ""
    if not text:
        return None
    return text if parser in MARKUP_ARGUMENTS else json.dumps(text, ensure_ascii=False)[1:-1]


class _Touch(NamedTuple):
    """A tool call on a file: the content that it writes, or the old and new text of its edit, and its result (`shown`);
    the path is empty if it names no file."""

    path: str
    written: str
    old: str
    new: str
    shown: str


def _last_file(touches: Iterable[_Touch]) -> str:
    """Return the text of the file that was touched last; empty if unknown. touches: the last call first.

    A call that writes or reads a file decides its text, so earlier calls on it are not needed.
    """
    touched: dict[str, list[_Touch]] = {}
    latest: deque[str] = deque()
    decided: set[str] = set()
    for touch in touches:
        if not touch.path or touch.path in decided:
            continue
        if touch.path not in touched:
            latest.append(touch.path)
        touched.setdefault(touch.path, []).append(touch)
        if touch.written or not touch.old:
            decided.add(touch.path)
        while latest and latest[0] in decided:
            if text := _replayed(touched[latest.popleft()]):
                return text
    return next(filter(None, (_replayed(touched[path]) for path in latest)), "")


def _replayed(touches: list[_Touch]) -> str:
    """Return the file's text after these calls, the last call first. A result counts while the text is unknown."""
    text = ""
    for path, written, old, new, shown in reversed(touches):
        text = written or (text.replace(old, new, 1) if old else "")
        text = (text or file_shown(shown, path, numbered=bool(old or new)) or "")[:_LONGEST]
    return text


def _touches(parts: Iterable[Mapping[str, Any]]) -> Iterator[_Touch]:
    results: dict[str, str] = {}
    for message in parts:
        results.update(_results(message))
        yield from (_touch(arguments, results.pop(name, "")) for name, arguments in _calls(message))
    yield from (_touch({}, shown) for shown in results.values())


def _touch(arguments: Mapping[str, Any], shown: str) -> _Touch:
    """Build the touch of a call. A result that shows a file with its path counts as one that wrote it."""
    path = "" if _first(arguments, _SEARCHES) else _first(arguments, _PATHS)
    if path:
        written, old, new = (_first(arguments, names) for names in (_CONTENTS, _OLD, _NEW))
        return _Touch(path, written, old, new, shown)
    header = _HEADER.search(shown) if "[File: " in shown else None
    text = file_shown(shown, header[1], numbered=True) if header else None
    return _Touch(header[1] if header and text else "", text or "", "", "", "")


def _offers_edits(body: Mapping[str, Any]) -> bool:
    tools = body.get("tools")
    if body.get("tool_choice") == "none" or not isinstance(tools, list):
        return False
    described = [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)]
    names = (entry.get("name") for entry in described if isinstance(entry, Mapping))
    return any(_EDITS.search(text_or_none(name) or "") for name in names)


def _parts(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield messages, their calls and the parts of their content, the last first: calls and results of every route are
    among these."""
    messages = body.get("messages", body.get("input"))
    for message in reversed(messages if isinstance(messages, list) else []):
        if isinstance(message, Mapping):
            for inside in (message.get("tool_calls"), message.get("content")):
                parts = inside if isinstance(inside, list) else []
                yield from (item for item in reversed(parts) if isinstance(item, Mapping))
            yield message


def _calls(item: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the id and the arguments of the tool call in this item, if there is one."""
    function = item.get("function")
    arguments = function.get("arguments") if isinstance(function, Mapping) else item.get("arguments")
    arguments = item.get("input") if item.get("type") == "tool_use" else arguments
    if isinstance(arguments, str):  # calls that name no file need not be parsed
        arguments = json_or_none(arguments) if "path" in arguments or "file" in arguments else {}
    if isinstance(arguments, Mapping):
        yield text_or_none(item.get("call_id", item.get("id"))) or "", arguments


def _results(item: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the call's id and the text of the tool result in this item, if there is one."""
    for kind in ("role", "type"):
        if names := _ANSWERS.get(text_or_none(item.get(kind)) or ""):
            name, content = map(item.get, names)
            yield text_or_none(name) or "", "" if item.get("is_error") else _plain(content)


def _plain(content: object) -> str:
    """Return the text of a result's content, cut at `_LONGEST` characters."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = (text_or_none(item.get("text")) or "" for item in parts if isinstance(item, Mapping))
    return "".join(texts)[:_LONGEST]


def _first(arguments: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((arguments[name] for name in names if isinstance(arguments.get(name), str)), "")

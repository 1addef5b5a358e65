"""What a request's conversation shows of files: read from its body, of any route."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from whiflash_sdk.presets import MARKUP_ARGUMENTS
from whiflash_sdk.reading import json_or_none, text_or_none
from whiflash_sdk.views import file_named, file_shown

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

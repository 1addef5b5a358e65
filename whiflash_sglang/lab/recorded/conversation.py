"""A recorded conversation in OpenAI's form, and the checks that every reader's result passes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whiflash_sglang.errors import ConfigError

MAX_MESSAGES = 10_000
"""Messages of one conversation."""

MAX_CHARS = 32 << 20
"""Characters of one conversation, in its messages and tools."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles that are read, and the role that templates know them by."""

Message = dict[str, Any]


class RecordError(ConfigError):
    """A recorded file cannot be read; the message names file, place and field."""


@dataclass(frozen=True)
class Conversation:
    """messages: `role`, `content` (text), for assistants also `tool_calls` and `reasoning_content`, for tools
    `tool_call_id`. tools: what was offered, where it was recorded. category: what figures are kept apart by.
    prediction: what the caller expected of the last answer (predicted outputs), where that was recorded.
    """

    id: str
    category: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    prediction: str | None = None

    @property
    def answers(self) -> int:
        """Recorded assistant messages."""
        return sum(message["role"] == "assistant" for message in self.messages)


def conversation(
    where: str, name: str, category: str, messages: Sequence[object], tools: object = None
) -> Conversation:
    """Check and normalise what a reader found. where: file and place in it, for errors.

    Raises:
        RecordError: a message or a tool is not of OpenAI's form, holds what is not text, or all of it is too much.
    """
    if len(messages) > MAX_MESSAGES:
        raise RecordError(f"{where}: {len(messages)} messages; at most {MAX_MESSAGES} are read")
    found = tuple(_message(f"{where}, messages[{i}]", message) for i, message in enumerate(messages))
    offered = () if tools is None else tools_of(f"{where}, tools", tools)
    chars = len(json.dumps(found)) + len(json.dumps(offered))
    if chars > MAX_CHARS:
        raise RecordError(f"{where}: {chars} characters; at most {MAX_CHARS} are read")
    return Conversation(name, category, found, offered)


def tools_of(where: str, value: object) -> tuple[Mapping[str, Any], ...]:
    """Tools of a request: a list in OpenAI's form."""
    found = []
    for i, given in enumerate(list_of(where, value)):
        function = object_of(f"{where}[{i}].function", object_of(f"{where}[{i}]", given).get("function"))
        if not text_of(f"{where}[{i}].function.name", function.get("name")):
            raise RecordError(f"{where}[{i}].function.name: is missing")
        found.append(given)
    return tuple(found)


def text_of(where: str, value: object) -> str:
    """Message content as text: a string, nothing, or a list of text parts."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_part(f"{where}[{i}]", part) for i, part in enumerate(value))
    if not isinstance(value, str):
        raise RecordError(f"{where}: must be text or a list of text parts, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{where}: holds a lone surrogate, which is not text") from None
    return value


def object_of(where: str, value: object) -> dict[str, Any]:
    """`value`, which must be a JSON object."""
    if not isinstance(value, dict):
        raise RecordError(f"{where}: must be an object, not {type(value).__name__}")
    return value


def list_of(where: str, value: object) -> list[Any]:
    """`value`, which must be a JSON list."""
    if not isinstance(value, list):
        raise RecordError(f"{where}: must be a list, not {type(value).__name__}")
    return value


def call(name: str, arguments: object) -> Message:
    """A tool call in OpenAI's form."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _part(where: str, part: object) -> str:
    kind = object_of(where, part).get("type")
    if kind not in ("text", "input_text", "output_text"):
        raise RecordError(f"{where}.type: {kind!r} is not text; other parts are not read")
    return text_of(f"{where}.text", object_of(where, part).get("text"))


def _message(where: str, raw: object) -> Message:
    given = object_of(where, raw)
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(f"{where}.role: {role!r} is not one of {', '.join(ROLES)}")
    message: Message = {"role": ROLES[role], "content": text_of(f"{where}.content", given.get("content"))}
    if role == "assistant":
        thought = text_of(f"{where}.reasoning_content", given.get("reasoning_content"))
        calls = given.get("tool_calls") or []
        listed = list_of(f"{where}.tool_calls", calls)
        if thought:
            message["reasoning_content"] = thought
        if listed:
            message["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", one) for i, one in enumerate(listed)]
    elif role == "tool" and given.get("tool_call_id") is not None:
        message["tool_call_id"] = text_of(f"{where}.tool_call_id", given["tool_call_id"])
    return message


def _call(where: str, raw: object) -> Message:
    given = object_of(where, raw)
    function = object_of(f"{where}.function", given.get("function"))
    name = text_of(f"{where}.function.name", function.get("name"))
    if not name:
        raise RecordError(f"{where}.function.name: is missing")
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call(name, text_of(f"{where}.function.arguments", arguments) or "{}")

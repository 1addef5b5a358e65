"""A recorded conversation in OpenAI's form, the checks that every reader's result passes, and what a server would see
of it: for every answer the prompt, and the tokens that were written."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from whiflash_sglang.checkpoints.manifest import load_manifest
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.spans.vocabulary import token_bytes

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


class Tokenizer(Protocol):
    """What is needed of a `transformers` tokenizer."""

    eos_token_id: int
    all_special_ids: list[int]
    added_tokens_decoder: Mapping[int, Any]

    def get_vocab(self) -> Mapping[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> Any: ...


@dataclass(frozen=True)
class Turn:
    """One recorded answer.

    prompt: tokens before it, as its template renders them. answer: its tokens, the end of the turn included.
    predictions: token ids by what arms of a benchmark may bring along.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    predictions: Mapping[str, Sequence[int]] = field(default_factory=dict)


class Renderer:
    """Turns of conversations in a target's tokens.

    Args:
        tokenizer: the target's. template: a chat template instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        self._tokenizer, self._template = tokenizer, template
        known = token_bytes(tokenizer)
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._endings = {
            known[token].decode(): token
            for token in sorted(special | set(tokenizer.all_special_ids))
            if known[token]
        }

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, without special ones added."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def turns(self, recorded: Conversation) -> Iterator[Turn]:
        """Every answer that is not empty, in order.

        Raises:
            ConfigError: the template does not render an answer behind its own generation prompt.
        """
        known_text, known_tokens = "", list[int]()
        for index, message in enumerate(recorded.messages):
            if message["role"] == "assistant":
                prompt_text = self._render(recorded, index, prompt=True)
                answer_text, ending = self._answer(recorded, index, prompt_text)
                prompt = self._extend(known_text, known_tokens, prompt_text)
                answer = self.encode(answer_text)
                known_text, known_tokens = prompt_text + answer_text, prompt + answer
                if answer:
                    yield Turn(prompt, [*answer, ending])

    def _render(self, recorded: Conversation, count: int, prompt: bool) -> str:
        messages = [
            {k: v for k, v in m.items() if k != "reasoning_content"} for m in recorded.messages[:count]
        ]
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tools=list(recorded.tools) or None,
            chat_template=self._template,
            add_generation_prompt=prompt,
            tokenize=False,
        )
        return text

    def _answer(self, recorded: Conversation, index: int, prompt: str) -> tuple[str, int]:
        """Text and the token that ends it: the last special one, before what the template puts between messages."""
        whole = self._render(recorded, index + 1, prompt=False)
        if not whole.startswith(prompt):
            raise ConfigError(
                f"{recorded.id}, answer {index}: the chat template does not render it behind its generation prompt"
            )
        text, ending = whole[len(prompt) :], self._tokenizer.eos_token_id
        at, last = max(((text.rfind(end), end) for end in self._endings), default=(-1, ""))
        if at >= 0:
            text, ending = text[:at], self._endings[last]
        thought = recorded.messages[index].get("reasoning_content")
        return (f"<think>\n{thought}\n</think>\n\n{text}" if thought else text), ending

    def _extend(self, known_text: str, known: list[int], text: str) -> list[int]:
        """Tokens of `text`; of what is known of it only what follows: a special token parts the two."""
        rest = text.removeprefix(known_text) if known_text else ""
        if rest and len(rest) < len(text) and rest.startswith(tuple(self._endings)):
            return known + self.encode(rest)
        return self.encode(text)


def renderer_of(target: Path, bundle: Path) -> Renderer:
    """Renders with a target's tokenizer, and the bundle's template where it has one."""
    from transformers import AutoTokenizer

    manifest = load_manifest(bundle)
    template = None if manifest.chat_template is None else bundle / manifest.chat_template
    text = None if template is None else template.read_text(encoding="utf-8")
    return Renderer(AutoTokenizer.from_pretrained(target), text)

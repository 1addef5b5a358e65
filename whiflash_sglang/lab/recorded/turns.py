"""Recorded conversations as a server would see them: for every answer the prompt, and the tokens that were
written."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lab.recorded.conversation import Conversation, Message
from whiflash_sglang.spans.vocabulary import Vocabulary, token_bytes

PROSE, REASONING, CODE, CALL, ARGUMENTS, QUOTED = (
    "prose",
    "reasoning",
    "code",
    "tool call",
    "arguments",
    "arguments, quoted",
)
KINDS = (PROSE, REASONING, CODE, CALL, ARGUMENTS, QUOTED)
"""What is written: text; thoughts; fenced code; a tool call around its arguments; arguments; lines in them that an
earlier message holds."""

QUOTED_CHARS = 12
"""Shortest line of an argument that counts as quoted, without the blanks around it."""


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

    conversation: whose. number: of the answer in it, from 1. prompt: tokens before it, as its template renders them.
    answer: its tokens, the end of the turn included. kinds: what each of them belongs to.
    """

    conversation: Conversation
    number: int
    prompt: list[int]
    answer: list[int]
    kinds: list[str]


class Renderer:
    """Turns of conversations in a target's tokens.

    Args:
        tokenizer: the target's. template: a chat template instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._bytes = token_bytes(tokenizer)
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = frozenset(special | set(tokenizer.all_special_ids))
        self._endings = {
            self._bytes[token].decode(): token for token in sorted(self._special) if self._bytes[token]
        }

    @property
    def vocabulary(self) -> Vocabulary:
        """What arms may know of the tokenizer."""
        return Vocabulary(self._encode, self._bytes, self._special)

    def turns(self, recorded: Conversation) -> Iterator[Turn]:
        """Every answer that is not empty, in order.

        Raises:
            ConfigError: the template does not render an answer behind its own generation prompt.
        """
        known_text, known_tokens, number = "", list[int](), 0
        earlier = ""
        for index, message in enumerate(recorded.messages):
            if message["role"] == "assistant":
                prompt_text = self._render(recorded, index, prompt=True)
                answer_text, ending = self._answer(recorded, index, prompt_text)
                prompt = self._extend(known_text, known_tokens, prompt_text)
                answer = self._encode(answer_text)
                known_text, known_tokens = prompt_text + answer_text, prompt + answer
                number += 1
                if answer:
                    kinds = self._kinds(message, answer_text, answer, earlier)
                    yield Turn(recorded, number, prompt, [*answer, ending], [*kinds, kinds[-1]])
            earlier += message["content"] + "\n"

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
            return known + self._encode(rest)
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _kinds(self, message: Message, text: str, tokens: Sequence[int], earlier: str) -> list[str]:
        painted = [KINDS[code] for code in _paint(message, text, earlier)]
        kinds, at = [], 0
        for token in tokens:
            kinds.append(painted[min(at, len(painted) - 1)])
            at += len(self._bytes[token])
        return kinds


def _paint(message: Message, text: str, earlier: str) -> bytes:
    """The index in `KINDS` of every byte of an answer."""
    content, calls = message["content"], message.get("tool_calls", [])
    kinds = bytearray(len(text))  # by characters first
    start = text.find(content) if content else 0
    start = text.find("</think>") + len("</think>") if message.get("reasoning_content") else max(start, 0)
    if message.get("reasoning_content"):
        _fill(kinds, 0, start, REASONING)
    _fill_fences(kinds, text, start)
    place = text.find(content, start) + len(content) if content and content in text[start:] else start
    if calls:
        _fill(kinds, place, len(text), CALL)
    for call in calls:
        arguments = call["function"]["arguments"]
        begin = text.find(arguments, place)
        if begin < 0:  # the template wrote them in another form
            continue
        place = begin + len(arguments)
        _fill(kinds, begin, place, ARGUMENTS)
        for line in _lines(arguments):
            written = json.dumps(line, ensure_ascii=False)[1:-1]
            at = text.find(written, begin, place)
            if at >= 0 and line in earlier:
                _fill(kinds, at, at + len(written), QUOTED)
    return b"".join(bytes([kind]) * len(char.encode()) for kind, char in zip(kinds, text, strict=True))


def _fill(kinds: bytearray, begin: int, end: int, kind: str) -> None:
    kinds[begin:end] = bytes([KINDS.index(kind)]) * max(end - begin, 0)


def _fill_fences(kinds: bytearray, text: str, start: int) -> None:
    while (begin := text.find("```", start)) >= 0:
        end = text.find("```", begin + 3)
        start = len(text) if end < 0 else end + 3
        _fill(kinds, begin, start, CODE)


def _lines(arguments: str) -> list[str]:
    """Lines of the strings in a call's arguments that are long enough to be quotations."""
    try:
        values = [json.loads(arguments)]
    except (ValueError, RecursionError):
        return []
    lines: list[str] = []
    while values:
        value = values.pop()
        if isinstance(value, str):
            lines += [line for line in map(str.strip, value.splitlines()) if len(line) >= QUOTED_CHARS]
        elif isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
    return lines

"""Reads the benchmark's prompts, bodies of chat completions or rows of published sets. Needs no server."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import MOST_BYTES, read_text
from whiflash_sglang.files.jsonl import parse_json_lines, read_json

SENT = ("tools", "tool_choice", "response_format", "temperature", "top_p")
"""Fields of a body that are sent as they are. A temperature that is left out is 0."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, as a user would send it.

    messages: OpenAI messages. follow_ups: further user turns, asked after the answers to those before them.
    fields: further fields of the body (`SENT`).
    """

    id: str
    category: str
    messages: tuple[dict[str, Any], ...]
    follow_ups: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Seed for sampling, the same for every arm and repetition."""
        return int(hashlib.sha256(self.id.encode()).hexdigest()[:7], 16)

    @property
    def sampling(self) -> dict[str, Any]:
        """Temperature and top_p of a sampled answer; empty if the answer is greedy."""
        drawn = {key: self.fields[key] for key in ("temperature", "top_p") if key in self.fields}
        return drawn if self.fields.get("temperature") else {}

    def request(self) -> dict[str, Any]:
        """Return the fields of a chat completion request."""
        return {"messages": list(self.messages), **self.fields}

    def next_turn(self, answer: str, calls: Sequence[Mapping[str, Any]] = ()) -> "Prompt | None":
        """Return the prompt after `answer`, its tool calls and the first follow-up; None without a follow-up."""
        if not self.follow_ups:
            return None
        called = {"tool_calls": list(calls)} if calls else {}
        reply = {"role": "assistant", "content": answer, **called}
        messages = (*self.messages, reply, {"role": "user", "content": self.follow_ups[0]})
        stem, _, turn = self.id.rpartition("#")
        stem, turn = (stem, turn) if stem and turn.isdecimal() else (self.id, "1")
        return replace(self, id=f"{stem}#{int(turn) + 1}", messages=messages, follow_ups=self.follow_ups[1:])


def shipped() -> Path:
    """Return the path of the package's own sample: 42 rows of seven categories, with licences in the rows."""
    return Path(__file__).with_name("prompts.jsonl")


def load_prompts(source: str) -> list[Prompt]:
    """Read the prompts of a JSONL or JSON file.

    Rows are bodies of chat completions (`messages`, and `SENT`) or of responses (`input`), also in a log's pairs of
    `request` and `response`; each may have an `id` and a `category`. SPEED-Bench's and Spec-Bench's rows are read, too
    (`question_id`, `category`, `turns`).

    Raises:
        ConfigError: naming the file and the row that is wrong.
    """
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise ConfigError(f"{source}: no such file; give JSON lines or a JSON list")
    rows = enumerate(rows_of_file(path), start=1)
    prompts = [prompt_of(row, f"{source}, row {number}", f"row {number}") for number, row in rows]
    if not prompts:
        raise ConfigError(f"{source} holds no prompts")
    return prompts


def prompt_of(row: Any, where: str, default: str = "") -> Prompt:
    """Convert a row to a prompt, by default with this id. Raises ConfigError naming `where` and the wrong field."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a row is a JSON object, not {type(row).__name__}")
    for name in ("request", "body"):
        if isinstance(body := row.get(name), str):
            with suppress(ValueError):
                body = read_json(body)
        if isinstance(body, dict):
            row = _only(row, "id", "category") | _only(body, *body)
    row = _only(row, *row)
    if "input" in row:
        row = _of_responses(row, where)
    turns, messages = row.get("turns") or [], row.get("messages") or []
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise ConfigError(f"{where}: 'turns' must be a list of strings")
    if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
        raise ConfigError(f"{where}: 'messages' must be a list, and every one an object with a 'role'")
    if not messages and not turns:
        raise ConfigError(f"{where}: neither 'messages' nor 'input' nor 'turns'")
    if not messages:
        messages, turns = [{"role": "user", "content": turns[0]}], turns[1:]
    for name in ("temperature", "top_p"):
        value = row.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{where}: '{name}' is {value!r:.80}: give a number, or leave it out")
    prompt = Prompt(
        id=str(row.get("id", row.get("question_id", default))),
        category=str(row.get("category", "chat")),
        messages=tuple(messages),
        follow_ups=tuple(turns),
        fields={key: row[key] for key in SENT if row.get(key)},
    )
    try:
        json.dumps([prompt.id, prompt.category, prompt.request(), prompt.follow_ups], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: holds a lone surrogate, which is not text") from None
    return prompt


def _of_responses(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the body of a chat completion that asks what this body of `/v1/responses` asks. Hosted tools and
    reasoning of earlier answers are left out."""
    given = row["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages = [{"role": "system", "content": text}] if (text := row.get("instructions")) else []
    try:
        for item in items:
            kind = item.get("type", "message")
            if kind == "message":
                content = item["content"]
                parts = content if isinstance(content, str) else "".join(part["text"] for part in content)
                messages.append({"role": item["role"], "content": parts})
            elif kind == "function_call":
                call = {"id": item["call_id"], "type": "function", "function": _only(item, "name", "arguments")}
                if not messages or "tool_calls" not in messages[-1]:
                    messages.append({"role": "assistant", "content": "", "tool_calls": []})
                messages[-1]["tool_calls"].append(call)
            elif kind == "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
            elif kind != "reasoning":
                raise ConfigError(f"{where}: 'input' has an item of type {kind!r:.40}, which no chat completion has")
        tools = [
            {"type": "function", "function": _only(tool, "name", "description", "parameters", "strict")}
            for tool in row.get("tools") or ()
            if tool["type"] == "function"
        ]
        choice, form = row.get("tool_choice"), (row.get("text") or {}).get("format") or {}
        named = {"type": "function", "function": {"name": choice["name"]}} if isinstance(choice, dict) else choice
        schema = {"type": "json_schema", "json_schema": _only(form, "name", "schema", "strict")}
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: 'input', 'tools' or 'text' is not as /v1/responses takes it: {error!r}") from None
    changed = {"messages": messages, "tools": tools, "tool_choice": named if tools else None}
    return {**row, **changed, "response_format": schema if form.get("type") == "json_schema" else None}


def _only(item: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: item[name] for name in names if item.get(name) is not None}


def sample(prompts: Iterable[Prompt], per_category: int | None) -> list[Prompt]:
    """Choose the first `per_category` prompts of each category, and order them so that categories alternate.

    Raises:
        ConfigError: two prompts share an id, such as `ID#2`, a row's second turn: their answers could be confused.
    """
    groups: dict[str, list[Prompt]] = defaultdict(list)
    seen: set[str] = set()
    for prompt in prompts:
        turn: Prompt | None = prompt
        while turn is not None:
            if turn.id in seen:
                raise ConfigError(f"two prompts have the id {turn.id!r}; ids must differ, also from `ID#2` of a turn")
            seen.add(turn.id)
            turn = turn.next_turn("")
        if per_category is None or len(groups[prompt.category]) < per_category:
            groups[prompt.category].append(prompt)
    longest = max(map(len, groups.values()), default=0)
    return [group[i] for i in range(longest) for group in groups.values() if i < len(group)]


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Return the sha256 over the prompts' ids and requests."""
    whole = hashlib.sha256()
    for prompt in prompts:
        whole.update(json.dumps([prompt.id, prompt.request(), prompt.follow_ups], sort_keys=True).encode())
    return whole.hexdigest()


def rows_of_file(path: Path) -> list[Any]:
    """Read the rows of JSON lines or of one JSON list. Raises ConfigError naming the file."""
    text = read_text(path, MOST_BYTES << 6)
    if text.lstrip().startswith("["):
        try:
            return list(read_json(text))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
    return [row for _, row in parse_json_lines(text, path)]

"""Prompts of the benchmark: our rows, SPEED-Bench's and Spec-Bench's files, data sets of the hub. Needs no server."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.jsonl import parse_json_lines


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, as a user would send it.

    messages: OpenAI messages. follow_ups: further user turns, asked after the answers to those before them.
    """

    id: str
    category: str
    messages: tuple[dict[str, Any], ...]
    follow_ups: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    response_format: dict[str, Any] | None = None

    @property
    def turn(self) -> int:
        """Which of the assistant's turns is asked for, from 1."""
        return 1 + len([m for m in self.messages if m["role"] == "assistant"])

    def request(self) -> dict[str, Any]:
        """Fields of a chat completion request: tools are required to be used, schemas are enforced."""
        fields: dict[str, Any] = {"messages": list(self.messages)}
        if self.tools:
            fields |= {"tools": list(self.tools), "tool_choice": "required"}
        if self.response_format is not None:
            fields["response_format"] = self.response_format
        return fields

    def next_turn(self, answer: str, calls: Sequence[Mapping[str, Any]] = ()) -> "Prompt | None":
        """The conversation after `answer`, its tool calls and the first follow-up; None where there is none left."""
        if not self.follow_ups:
            return None
        called = {"tool_calls": list(calls)} if calls else {}
        said, user = {"role": "assistant", "content": answer}, {"role": "user", "content": self.follow_ups[0]}
        messages = (*self.messages, {**said, **called}, user)
        stem, _, turn = self.id.partition("#")
        return replace(
            self, id=f"{stem}#{int(turn or 1) + 1}", messages=messages, follow_ups=self.follow_ups[1:]
        )


def shipped() -> Path:
    """The sample that comes with the package: 42 rows of seven categories, licences in the rows."""
    return Path(str(resources.files("whiflash_sglang"))) / "lab" / "bench" / "prompts.jsonl"


def load_prompts(source: str) -> list[Prompt]:
    """Read a JSONL or JSON file, or a data set of the hub as `owner/name[:config]`.

    Rows are ours (`messages`, optionally `tools` and `response_format`), or SPEED-Bench's and Spec-Bench's
    (`question_id`, `category`, `turns`).

    Raises:
        ConfigError: naming the file and the row that is wrong.
    """
    path = Path(source).expanduser()
    rows = rows_of_file(path) if path.exists() else _rows_of_hub(source)
    prompts = [prompt_of(row, f"{source}, row {number}") for number, row in enumerate(rows, start=1)]
    if not prompts:
        raise ConfigError(f"{source} holds no prompts")
    return prompts


def prompt_of(row: Any, where: str) -> Prompt:
    """A row of a supported format. Raises ConfigError naming `where` and what is missing."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a row is a JSON object, not {type(row).__name__}")
    turns, messages = row.get("turns"), row.get("messages")
    if not messages and not turns:
        raise ConfigError(f"{where}: neither 'messages' nor 'turns'")
    if not messages:
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ConfigError(f"{where}: 'turns' must be a list of strings")
        messages, turns = [{"role": "user", "content": turns[0]}], turns[1:]
    elif not all(isinstance(message, dict) and "role" in message for message in messages):
        raise ConfigError(f"{where}: every one of 'messages' is an object with a 'role'")
    return Prompt(
        id=str(row.get("id", row.get("question_id", _digest(row)))),
        category=str(row.get("category", "chat")),
        messages=tuple(messages),
        follow_ups=tuple(turns or ()),
        tools=tuple(row.get("tools") or ()),
        response_format=row.get("response_format"),
    )


def sample(prompts: Iterable[Prompt], per_category: int | None) -> list[Prompt]:
    """At most `per_category` of each category, in their order, the categories taking turns.

    Raises:
        ConfigError: two rows share an id, so that answers could not be told apart.
    """
    groups: dict[str, list[Prompt]] = defaultdict(list)
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ConfigError(f"two prompts have the id {prompt.id!r}; ids must differ")
        seen.add(prompt.id)
        if per_category is None or len(groups[prompt.category]) < per_category:
            groups[prompt.category].append(prompt)
    longest = max(map(len, groups.values()), default=0)
    return [group[i] for i in range(longest) for group in groups.values() if i < len(group)]


def digest_of(prompts: Sequence[Prompt]) -> str:
    """sha256 over ids and requests."""
    whole = hashlib.sha256()
    for prompt in prompts:
        whole.update(json.dumps([prompt.id, prompt.request(), prompt.follow_ups], sort_keys=True).encode())
    return whole.hexdigest()


def _digest(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()[:12]


def rows_of_file(path: Path) -> list[Any]:
    """Rows of JSON lines or of one JSON list. Raises ConfigError naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
    return [row for _, row in parse_json_lines(text, path)]


def _rows_of_hub(source: str) -> list[Any]:
    name, _, config = source.partition(":")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{source}: no such file, and not a data set of the form owner/name[:config]")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError("data sets of the hub need: pip install 'whiflash-sglang[train]'") from None
    try:
        splits = load_dataset(name, config or None)
    except (
        Exception
    ) as error:  # The library raises a dozen unrelated types; the first line says which it was.
        raise ConfigError(f"{source}: the hub gave nothing: {str(error).splitlines()[0]}") from None
    return list(splits["test"] if "test" in splits else next(iter(splits.values())))

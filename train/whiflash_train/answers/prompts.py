"""Render prompt rows as the server would, with the bundle's template and each request's grammar; split off test rows.

`response_format` is a JSON schema with any whitespace (the server's default); `tool_choice: required` under the
`hermes` parser is a structural tag whose argument schema is open unless the tool is strict.

Prompts are held out (`split`) if no training prompt is about anything that an evaluation prompt is about. A prompt is
about its topics:

user          a simulated user, named outside the system message; benchmarks of agents have one per task
conversation  the first user turn, since a recorded conversation gives one prompt for each of its turns
tool          a tool's whole definition, if there is one user turn; longer conversations naturally share tools
schema        the schema that the answer must fit
"""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from jinja2 import TemplateError
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from whiflash_sglang.checkpoints.manifest import first_problem
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import MOST_BYTES, read_text
from whiflash_sglang.files.jsonl import parse_json_lines, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Grammar = dict[str, str]
"""SGLang's sampling parameter that constrains an answer: name → JSON text."""


def response_format_grammar(response_format: dict[str, Any]) -> Grammar | None:
    """Return the grammar of an OpenAI `response_format`; None for plain text. Raises ValueError for others."""
    match response_format:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"json_schema": json.dumps({"type": "object"})}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json_schema": json.dumps(schema)}
    raise ValueError("it needs a type, one of text, json_object, json_schema, and the last one json_schema.schema")


def tool_call_grammar(tools: Sequence[dict[str, Any]]) -> Grammar | None:
    """Return the grammar of `tool_choice: required` under SGLang's `hermes` parser: at least one tool call. None if the
    parser has no constraint for these tools.
    """
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    parser = FunctionCallParser([Tool(**tool) for tool in tools], "hermes")
    asked = parser.get_structure_constraint("required")
    return asked and {asked[0]: json.dumps(asked[1].model_dump(by_alias=True))}


class PromptRow(NamedTuple):
    """A request: token ids of the rendered conversation, and the grammar that constrains its answer."""

    id: str
    category: str
    tokens: list[int]
    grammar: Grammar | None


class _Call(BaseModel):
    function: dict[str, Any]


class _Message(BaseModel):
    role: str
    tool_calls: list[_Call] | None = None


class _Row(BaseModel):
    """The keys of a row that this module reads. SGLang and the template check the others."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    id: str = ""
    category: str = ""
    tools: list[dict[str, Any]] | None = None
    response_format: Annotated[dict[str, Any], AfterValidator(response_format_grammar)] | None = None


def check_row(row: Any, where: str) -> None:
    """Raise ConfigError, beginning with `where`, if a key of `_Row` is missing or has another type."""
    try:
        _Row.model_validate(row)
    except ValidationError as error:
        why = first_problem(error, _Row, str)
        raise ConfigError(f"{where}: {why}; a row needs 'messages', each with a 'role'") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL prompt file and add missing ids and categories. Raises ConfigError naming the line."""
    rows = []
    for number, row in parse_json_lines(read_text(path, MOST_BYTES << 6), path):
        check_row(row, f"{path}, line {number}")
        content = json.dumps(row, sort_keys=True, ensure_ascii=False)
        row.setdefault("id", hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:12])
        row.setdefault("category", "chat")
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path} holds no prompts")
    return rows


def check_ids(rows: Iterable[dict[str, Any]]) -> None:
    """Raise ConfigError if two rows share an id, since answers are stored by id."""
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise ConfigError(
                f"two prompts have the id {row['id']!r}; every prompt is answered once, so ids must differ"
            )
        seen.add(row["id"])


def balanced(rows: Iterable[dict[str, Any]], weights: Mapping[str, float], seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows shuffled so that every prefix mixes the categories in proportion to `weights` (default 1)."""
    generator = random.Random(seed)
    queues: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        queues[row["category"]].append(row)
    for queue in queues.values():
        generator.shuffle(queue)
    credit = dict.fromkeys(sorted(queues), 0.0)
    while queues:
        for category in queues:
            credit[category] += weights.get(category, 1.0)
        chosen = max(queues, key=lambda category: credit[category])
        if credit[chosen] <= 0:
            return
        credit[chosen] -= sum(weights.get(category, 1.0) for category in queues)
        yield queues[chosen].pop()
        if not queues[chosen]:
            del queues[chosen]


def served_tools(where: str, tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return tools as SGLang's chat route passes them to a template: with all fields of its `Tool`, even null.
    Raises ConfigError, beginning with `where`, if a tool does not validate.
    """
    if not tools:
        return None
    from sglang.srt.entrypoints.openai.protocol import Tool

    try:
        return [Tool.model_validate(tool).model_dump() for tool in tools]
    except ValidationError as error:
        raise ConfigError(f"{where}: SGLang refuses a tool: {first_problem(error, Tool, str)}") from None


def prepare(
    row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", template: str | None, required_share: float
) -> PromptRow:
    """Render a row. A share `required_share` of the rows with tools, chosen by id, gets `tool_choice: required`. Raises
    ConfigError if the template refuses the messages.
    """
    messages, where = [served_message(message) for message in row["messages"]], f"prompt {row['id']}"
    tools = served_tools(where, row.get("tools"))
    options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True, "return_dict": True}
    try:
        encoded = tokenizer.apply_chat_template(messages, tools=tools, **options)
    except TemplateError as error:
        raise ConfigError(f"{where}: the chat template refuses its messages: {error}") from None
    grammar = None
    if row.get("response_format"):
        grammar = response_format_grammar(row["response_format"])
    elif tools and int(hashlib.sha256(row["id"].encode()).hexdigest(), 16) % 1000 < required_share * 1000:
        grammar = tool_call_grammar(tools)
    return PromptRow(row["id"], row["category"], list(encoded["input_ids"]), grammar)


def served_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as SGLang passes it to a template: missing content is "", a call's arguments are an object."""
    calls = [{**call, "function": {**call["function"]}} for call in message.get("tool_calls") or ()]
    for function in (call["function"] for call in calls):
        with suppress(AttributeError, KeyError, ValueError):  # an object, missing, or refused later
            function["arguments"] = read_json(function["arguments"])
    given = {name: value for name, value in message.items() if value is not None}
    return {"content": "", **given, **({"tool_calls": calls} if calls else {})}


USERS = r"\b[a-z]+_[a-z]+_\d{4}\b"
"""Pattern of tau-bench's user names, such as mia_li_3668."""

UNNAMED = "unnamed user"
"""Reason in `Split.dropped`: the row names no user, though held-out rows of its source do."""

Topic = tuple[str, str]
"""A topic: its kind ("user", "conversation", "tool", "schema") and its value."""


@dataclass(frozen=True)
class Split:
    """Result of `split`. kept: remaining training rows. dropped: dropped rows, by source and kind of shared topic."""

    kept: list[dict[str, Any]]
    dropped: Counter[tuple[str, str]]


def topics_of(row: dict[str, Any], users: re.Pattern[str]) -> set[Topic]:
    """Return a row's topics; `users` matches names of simulated users."""
    dialogue = [message for message in row["messages"] if message["role"] != "system"]
    turns = [_text(message) for message in dialogue if message["role"] == "user"]
    topics = {("user", name) for name in users.findall(json.dumps(dialogue))}
    if turns:
        topics.add(("conversation", " ".join(turns[0].split()).casefold()))
    if len(turns) == 1:
        topics |= {("tool", json.dumps(tool, sort_keys=True)) for tool in row.get("tools") or ()}
    if row.get("response_format"):
        topics.add(("schema", json.dumps(row["response_format"], sort_keys=True)))
    return topics


def split(train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], users: str = USERS) -> Split:
    """Drop the rows of `train` that share a topic with `held_out`.

    All conversations of a user belong together, and so do all prompts of a conversation, even those that do not name
    the user: if one of them shares a topic, all are dropped.
    """
    pattern = re.compile(users)
    learned = [topics_of(row, pattern) for row in train]
    evaluated = [topics_of(row, pattern) for row in held_out]
    taken = _grown(set().union(*evaluated), [*learned, *evaluated])
    named = {topic for topics in (*learned, *evaluated) if _of(topics, "user") for topic in topics}
    with_users = {_source(row) for row, about in zip(held_out, evaluated, strict=True) if _of(about, "user")}
    kept, dropped = [], Counter[tuple[str, str]]()
    for row, topics in zip(train, learned, strict=True):
        shared = next((kind for kind in ("user", "conversation", "tool", "schema") if _of(topics & taken, kind)), None)
        if shared is None and _source(row) in with_users and not topics & named:
            shared = UNNAMED
        if shared is None:
            kept.append(row)
        else:
            dropped[_source(row), shared] += 1
    return Split(kept, dropped)


def _grown(taken: set[Topic], rows: Sequence[set[Topic]]) -> set[Topic]:
    """Return `taken` with all users and conversations that rows link to it, directly or through others."""
    linking = [{topic for topic in topics if topic[0] in ("user", "conversation")} for topics in rows]
    while True:
        linked = taken.union(*(topics for topics in linking if topics & taken))
        if linked == taken:
            return taken
        taken = linked


def _of(topics: set[Topic], kind: str) -> bool:
    return any(topic[0] == kind for topic in topics)


def _source(row: dict[str, Any]) -> str:
    return str(row.get("source") or row.get("category") or "")


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True)

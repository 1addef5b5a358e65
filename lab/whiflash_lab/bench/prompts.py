"""Reads the benchmark's prompts: rows of our own format, and files of published suites. Needs no server.

A published suite is an entry of `SUITES`: the files of a folder, the format of a row's question, the licence, and the
folder's origin. Nothing is downloaded.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from whiflash_lab.conversations import read_recorded
from whiflash_sglang.errors import ConfigError, UsageError
from whiflash_sglang.files.disk import MOST_BYTES, read_text
from whiflash_sglang.files.jsonl import parse_json_lines, read_json


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, as a user would send it.

    messages: OpenAI messages. follow_ups: further user turns, asked after the answers to those before them.
    tool_choice: OpenAI's, sent with tools.
    """

    id: str
    category: str
    messages: tuple[dict[str, Any], ...]
    follow_ups: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    response_format: dict[str, Any] | None = None
    tool_choice: Any = "required"

    @property
    def seed(self) -> int:
        """Seed for sampling, the same for every arm and repetition."""
        return int(hashlib.sha256(self.id.encode()).hexdigest()[:7], 16)

    def request(self) -> dict[str, Any]:
        """Return the fields of a chat completion request."""
        fields: dict[str, Any] = {"messages": list(self.messages)}
        if self.tools:
            fields |= {"tools": list(self.tools), "tool_choice": self.tool_choice}
        if self.response_format is not None:
            fields["response_format"] = self.response_format
        return fields

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
    """Read a JSONL or JSON file.

    Rows are ours (`messages`, optionally `tools` and `response_format`), or SPEED-Bench's and Spec-Bench's
    (`question_id`, `category`, `turns`).

    Raises:
        ConfigError: naming the file and the row that is wrong.
    """
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise ConfigError(f"{source}: no such file; give JSON lines or a JSON list")
    rows = enumerate(rows_of_file(path), start=1)
    prompts = [prompt_of(row, f"{source}, row {number}") for number, row in rows]
    if not prompts:
        raise ConfigError(f"{source} holds no prompts")
    return prompts


def prompt_of(row: Any, where: str) -> Prompt:
    """Convert a row of a supported format to a prompt. Raises ConfigError naming `where` and the missing field."""
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
    digest = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return Prompt(
        id=str(row.get("id", row.get("question_id", digest))),
        category=str(row.get("category", "chat")),
        messages=tuple(messages),
        follow_ups=tuple(turns or ()),
        tools=tuple(row.get("tools") or ()),
        response_format=row.get("response_format"),
        tool_choice=row.get("tool_choice") or "required",
    )


def sample(prompts: Iterable[Prompt], per_category: int | None) -> list[Prompt]:
    """Choose the first `per_category` prompts of each category, and order them so that categories alternate.

    Raises:
        ConfigError: two rows share an id, so that their answers could be confused.
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


SAMPLE = "sample"
"""Word that replaces a file's name: the tools of the shipped prompts."""


def load_tools(source: str) -> tuple[dict[str, Any], ...]:
    """Read tools in OpenAI's form from a JSON list, or those of the shipped prompts (`SAMPLE`).

    Raises:
        ConfigError: naming the file.
    """
    if source == SAMPLE:
        return tuple(tool for prompt in load_prompts(str(shipped())) for tool in prompt.tools)
    tools = rows_of_file(Path(os.path.expanduser(source)))
    if not tools or not all(_name_of(tool) for tool in tools):
        raise ConfigError(f"--tools {source}: takes a list of OpenAI's tools, each with a function's name")
    return tuple(tools)


def with_tools(
    prompt: Prompt, tools: Sequence[dict[str, Any]], choice: str | None, *, strict: bool
) -> Prompt:
    """Add `tools` after a prompt's own, with this `tool_choice` or its own. strict: make all its tools strict.

    A prompt whose answer has a schema is returned unchanged.
    """
    if prompt.response_format is not None:
        return prompt
    # If tools have the same name, the first is kept, which is the request's own.
    by_name = {_name_of(tool): tool for tool in reversed((*prompt.tools, *tools))}
    several = list(reversed(by_name.values()))
    if strict:
        several = [{**tool, "function": {**tool["function"], "strict": True}} for tool in several]
    return replace(prompt, tools=tuple(several), tool_choice=choice or prompt.tool_choice)


def _name_of(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


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


REASONING = "\nPlease reason step by step, and put your final answer within \\boxed{{}}."
DEEPSPEC = "eval_datasets/ of github.com/deepseek-ai/DeepSpec"
SPEC_BENCH = "data/spec_bench/ of github.com/hemingkx/Spec-Bench"
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass(frozen=True, slots=True)
class Suite:
    """A published set of prompts.

    files: a pattern in the folder. source: origin of the folder. licence: of the prompts, according to their source.
    asks: the user's turn as a format of a row's fields, for rows without `turns`. merged: category → name in the
    report, for rows that are reported by category; None: all under the suite's name. wheel: a package whose `data` is
    the folder. read: reads a file whose rows have another format.
    """

    files: str
    licence: str
    source: str
    asks: str = ""
    merged: Mapping[str, str] | None = None
    wheel: str | None = None
    read: Callable[[Path], Iterator[Prompt]] | None = None


def suites_of(listed: str) -> list[str]:
    """Split names of suites at commas and resolve groups. Raises UsageError if a name is unknown."""
    parts = [label.strip() for label in listed.split(",") if label.strip()]
    names = list(dict.fromkeys(name for label in parts for name in GROUPS.get(label, (label,))))
    for name in names:
        if name not in SUITES:
            raise UsageError(f"--suite: {name!r} is not one of {', '.join((*SUITES, *GROUPS))}")
    return names


def read_suites(names: Sequence[str], folder: Path | None) -> list[Prompt]:
    """Read the prompts of the suites `names` from files in `folder`, or without it from installed wheels.

    Raises:
        UsageError: neither a folder nor a wheel is there. ConfigError: files are missing, or a row is wrong; it names
            the file.
    """
    prompts: list[Prompt] = []
    for name in names:
        suite = SUITES[name]
        root = folder or _of_wheel(name, suite)
        files = sorted(root.glob(suite.files))
        if not files:
            raise ConfigError(f"--suite {name}: no {suite.files} in {root}; it is in {suite.source}")
        for file in files:
            prompts += _asked(name, suite, file) if suite.read is None else suite.read(file)
    return prompts


def _of_wheel(name: str, suite: Suite) -> Path:
    spec = find_spec(suite.wheel) if suite.wheel else None
    if spec is None or spec.origin is None:
        raise UsageError(
            f"--suite {name} needs --suite-dir DIRECTORY with {suite.files}: {suite.source} ({suite.licence})"
        )
    return Path(spec.origin).parent / "data"


def _asked(name: str, suite: Suite, file: Path) -> Iterator[Prompt]:
    """Read a suite's rows, which have `turns`, or fields from which `Suite.asks` makes a question."""
    for number, row in enumerate(rows_of_file(file), start=1):
        where = f"{file}, row {number}"
        if isinstance(row, dict) and suite.asks and "turns" not in row:
            try:
                row = {**row, "turns": [suite.asks.format_map(row)]}
            except KeyError as missing:
                raise ConfigError(f"{where}: neither 'turns' nor {missing}") from None
        prompt = prompt_of(row, where)
        category = name if suite.merged is None else suite.merged.get(prompt.category, prompt.category)
        yield replace(prompt, id=f"{file.stem}-{number}", category=category)


def _recorded(file: Path) -> Iterator[Prompt]:
    """Make one prompt of each recorded conversation: the messages before its middle answer."""
    for number, talk in enumerate(read_recorded(file), start=1):
        answers = [at for at, message in enumerate(talk.messages) if message["role"] == "assistant" and at]
        if answers:
            before = talk.messages[: answers[len(answers) // 2]]
            yield Prompt(f"{file.parent.name}/{file.stem}-{number}", talk.category, before)


# ------------------------------------------------------------------------------------------------------------- BFCL

BFCL_TYPES = {
    **dict.fromkeys(("object", "dict", "HashMap", "Hashtable"), "object"),
    **dict.fromkeys(("array", "list", "tuple", "ArrayList", "Array", "Queue", "Stack"), "array"),
    **dict.fromkeys(("integer", "byte", "short", "long"), "integer"),
    **dict.fromkeys(("number", "float", "double"), "number"),
    **dict.fromkeys(("boolean", "bool"), "boolean"),
}
"""BFCL's type names → JSON schema's; all others become strings, as in BFCL's own `GORILLA_TO_OPENAPI`."""

BFCL_CLASSES = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
"""Classes of multi-turn rows → the files of `multi_turn_func_doc` that describe their functions."""


def _bfcl(file: Path) -> Iterator[Prompt]:
    """Read BFCL's questions, their functions as tools. Later turns follow plain decoding's calls, which are not run."""
    category = file.stem.removeprefix("BFCL_v4_")
    if not category.startswith(BFCL_SETS):
        return
    for number, row in enumerate(rows_of_file(file), start=1):
        try:
            first, *later = (turn for turn in row["question"] if turn)
            functions = row["function"] if "function" in row else _functions(file.parent, row)
            yield Prompt(
                id=row["id"],
                category=category,
                messages=tuple(first),
                follow_ups=tuple("\n".join(message["content"] for message in turn) for turn in later),
                tools=tuple({"type": "function", "function": _function(function)} for function in functions),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{file}, row {number}: no question with functions of BFCL v4 ({error!r})"
            ) from None


BFCL_SETS = (
    *("simple_", "multiple", "parallel", "live_simple", "live_multiple", "live_parallel"),
    *("multi_turn_base", "multi_turn_miss_param"),
)
"""Sets in which a call is due and all tools are known from the start (`multi_turn_miss_func` adds one later). The
multi-turn set of long contexts has the prompts of `multi_turn_base`; what is long is said by tools."""


def _functions(folder: Path, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    excluded = set(row.get("excluded_function") or ())
    for involved in row["involved_classes"]:
        for function in rows_of_file(folder / "multi_turn_func_doc" / f"{BFCL_CLASSES[involved]}.json"):
            if function["name"] not in excluded:
                yield function


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a function to OpenAI's form: no dots in its name, JSON schema's types, no description of its result."""
    kept = {key: function[key] for key in ("name", "description", "parameters")}
    return {**_typed(kept), "name": function["name"].replace(".", "_")}


def _typed(schema: Any) -> Any:
    """Convert every `type` in `schema` to JSON schema's names. A property called `type` is an object, and stays."""
    if isinstance(schema, list):
        return [_typed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    typed = {key: _typed(value) for key, value in schema.items()}
    if isinstance(typed.get("type"), str):
        typed["type"] = BFCL_TYPES.get(typed["type"], "string")
    return typed


SUITES: Mapping[str, Suite] = {
    "spec-bench": Suite(
        "question.jsonl", "Apache-2.0", SPEC_BENCH, merged=dict.fromkeys(MT_BENCH, "multi-turn")
    ),
    "gsm8k": Suite("gsm8k.jsonl", "MIT", DEEPSPEC, "{question}" + REASONING),
    "math500": Suite("math500.jsonl", "MIT", DEEPSPEC, "{problem}" + REASONING),
    "aime": Suite("aime2*.jsonl", "MIT; problems of the MAA", DEEPSPEC, "{problem}" + REASONING),
    "humaneval": Suite(
        "humaneval.jsonl",
        "MIT",
        DEEPSPEC,
        "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```",
    ),
    "mbpp": Suite("mbpp.jsonl", "CC-BY-4.0", DEEPSPEC, "{prompt}"),
    "livecodebench": Suite("livecodebench.jsonl", "MIT; problems of contests", DEEPSPEC),
    "lbpp": Suite("lbpp.jsonl", "Apache-2.0", DEEPSPEC, "{instruction}"),
    "mt-bench": Suite("mt-bench.jsonl", "Apache-2.0", DEEPSPEC),
    "arena-hard-v2": Suite("arena-hard-v2.jsonl", "Apache-2.0", DEEPSPEC, "{prompt}"),
    "ifeval": Suite(
        "input_data.jsonl",
        "Apache-2.0",
        "instruction_following_eval/data/ of github.com/google-research/google-research",
        "{prompt}",
    ),
    "bfcl": Suite(
        "BFCL_v4_*.json", "Apache-2.0", "the wheel bfcl-eval, bfcl_eval/data", wheel="bfcl_eval", read=_bfcl
    ),
    "tau2": Suite(
        "**/*.json",
        "MIT",
        "web/leaderboard/public/submissions/*/trajectories of github.com/sierra-research/tau2-bench at 52a4ed7b",
        read=_recorded,
    ),
    "swe-agent": Suite(
        "**/*.traj", "MIT", "trajectories/demonstrations/ of github.com/SWE-agent/SWE-agent", read=_recorded
    ),
    "mini-swe-agent": Suite("**/*.traj.json", "as of the tasks", "what mini-swe-agent wrote", read=_recorded),
}
GROUPS = {"deepspec": tuple(name for name, suite in SUITES.items() if suite.source == DEEPSPEC)}
"""Names of groups → the suites in them."""

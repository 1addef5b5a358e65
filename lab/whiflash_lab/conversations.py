"""Reads recorded conversations of several formats as OpenAI's messages, and renders them in a target's tokens.

All readers' messages pass the same checks. `Renderer` returns for every answer its prompt's tokens and its own.

A reader takes a record's place in its file, a name and the record, and raises `ConfigError` naming the wrong field.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from whiflash_sglang.checkpoints.manifest import load_manifest
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import read_text
from whiflash_sglang.files.jsonl import NOT_AS_WRITTEN, lines_of, read_json
from whiflash_sglang.spans.hints import HintError
from whiflash_sglang.spans.prediction import body_prediction
from whiflash_sglang.spans.vocabulary import vocabulary_of
from whiflash_train.answers.prompts import served_message, served_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_MESSAGES = 10_000
"""Most messages of one conversation."""

MAX_CHARS = 32 << 20
"""Most characters of one conversation, in its messages and tools."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles that are read → the role that chat templates use."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A recorded conversation. messages: `role`, `content` (text), for assistants also `tool_calls` and
    `reasoning_content`, for tools `tool_call_id`; an answer that was not recorded has its number of `tokens` instead.
    tools: the tools offered, if recorded. category: by which figures are grouped. prediction: the caller's prediction
    of the last answer (predicted outputs), if recorded. parent: for a subagent, the id of the conversation that it
    serves, and after how many answers of it the subagent begins. task: name of the task, which several conversations
    may try; if recorded. waits: seconds before each answer's request in which tools ran or a user thought; 0 if not
    recorded."""

    id: str
    category: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    prediction: str | None = None
    parent: tuple[str, int] | None = None
    task: str = ""
    waits: tuple[float, ...] = ()

    @property
    def answers(self) -> int:
        """Number of recorded assistant messages."""
        return sum(message["role"] == "assistant" for message in self.messages)


def conversation(
    where: str, name: str, category: str, messages: Sequence[object], tools: object = None
) -> Conversation:
    """Return a conversation of these OpenAI messages, checked and normalised. where: file and place in it, for errors.

    Raises:
        ConfigError: a message or a tool is not of OpenAI's form, holds something else than text, or is too large.
    """
    if len(messages) > MAX_MESSAGES:
        raise ConfigError(f"{where}: {len(messages)} messages; at most {MAX_MESSAGES} are read")
    normalised = tuple(_message(f"{where}, messages[{i}]", message) for i, message in enumerate(messages))
    offered = () if tools is None else tools_of(f"{where}, tools", tools)
    chars = len(json.dumps(normalised)) + len(json.dumps(offered))
    if chars > MAX_CHARS:
        raise ConfigError(f"{where}: {chars} characters; at most {MAX_CHARS} are read")
    waits, ended, ready = list[float](), math.nan, math.nan
    for message, raw in zip(normalised, messages, strict=True):
        moment = _moment(object_of(where, raw))
        if message["role"] == "assistant":
            waits.append(max(ready - ended, 0.0) if math.isfinite(ready - ended) else 0.0)
            ended, ready = moment, math.nan
        elif math.isfinite(moment):
            ready = moment
    return Conversation(name, category, normalised, offered, waits=tuple(waits))


def _moment(message: Message) -> float:
    """Return a message's `timestamp`, which mini-swe-agent writes into `extra`, in seconds; NaN without one."""
    extra = message.get("extra")
    moment: Any = message.get("timestamp", extra.get("timestamp") if isinstance(extra, dict) else None)
    try:
        return datetime.fromisoformat(moment).timestamp() if isinstance(moment, str) else float(moment)
    except (ValueError, TypeError, OverflowError):
        return math.nan


def tools_of(where: str, value: object) -> tuple[Mapping[str, Any], ...]:
    """Check and return a request's tools, a list in OpenAI's form."""
    tools = list_of(where, value)
    for i, tool in enumerate(tools):
        _function(f"{where}[{i}]", tool)
    return tuple(tools)


def text_of(where: str, value: object) -> str:
    """Return message content as text; it may be a string, None, or a list of text parts."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_part(f"{where}[{i}]", content) for i, content in enumerate(value))
    if not isinstance(value, str):
        raise ConfigError(f"{where}: must be text or a list of text parts, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: holds a lone surrogate, which is not text") from None
    return value


def object_of(where: str, value: object) -> dict[str, Any]:
    """Return `value`, which must be a JSON object."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be an object, not {type(value).__name__}")
    return value


def list_of(where: str, value: object) -> list[Any]:
    """Return `value`, which must be a JSON list."""
    if not isinstance(value, list):
        raise ConfigError(f"{where}: must be a list, not {type(value).__name__}")
    return value


def call(name: str, arguments: object) -> Message:
    """Return a tool call in OpenAI's form."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _part(where: str, content: object) -> str:
    kind = object_of(where, content).get("type")
    if kind not in ("text", "input_text", "output_text"):
        raise ConfigError(f"{where}.type: {kind!r} is not text; other parts are not read")
    return text_of(f"{where}.text", object_of(where, content).get("text"))


def _message(where: str, raw: object) -> Message:
    fields = object_of(where, raw)
    role = fields.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ConfigError(f"{where}.role: {role!r} is not one of {', '.join(ROLES)}")
    message: Message = {"role": ROLES[role], "content": text_of(f"{where}.content", fields.get("content"))}
    if role == "assistant":
        said = fields["reasoning"] if isinstance(fields.get("reasoning"), str) else None  # vLLM's name of it
        thought = text_of(f"{where}.reasoning_content", fields.get("reasoning_content") or said)
        listed = list_of(f"{where}.tool_calls", fields.get("tool_calls") or [])
        if thought:
            message["reasoning_content"] = thought
        if listed:
            message["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", each) for i, each in enumerate(listed)]
        if isinstance(tokens := fields.get("tokens"), int) and tokens > 0:
            message["tokens"] = tokens
    elif role == "tool" and fields.get("tool_call_id") is not None:
        message["tool_call_id"] = text_of(f"{where}.tool_call_id", fields["tool_call_id"])
    return message


def _function(where: str, raw: object) -> tuple[str, object]:
    """Return the name and, for a call, the arguments of the function of a tool or a call."""
    function = object_of(f"{where}.function", object_of(where, raw).get("function"))
    name = text_of(f"{where}.function.name", function.get("name"))
    if not name:
        raise ConfigError(f"{where}.function.name: is missing")
    return name, function.get("arguments")


def _call(where: str, raw: object) -> Message:
    name, arguments = _function(where, raw)
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call(name, text_of(f"{where}.function.arguments", arguments) or "{}")


@dataclass(frozen=True)
class RecordedTurn:
    """One recorded answer.

    prompt: tokens before it, as the chat template renders them. answer: its tokens, the end of the turn included.
    predictions: by suffix of a benchmark's arm (`bench.arms`), token ids that its requests bring. wait: seconds
    between the conversation's answer before and the request. free: tokens that the target writes as it likes, if the
    answer was not recorded.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    predictions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    wait: float = 0.0
    free: int = 0

    @property
    def context(self) -> int:
        """Number of tokens of the prompt and the answer together."""
        return len(self.prompt) + len(self.answer) + self.free


class Renderer:
    """Renders the turns of conversations in a target's tokens.

    Args:
        tokenizer: the target's. template: a chat template that replaces the tokenizer's own.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> None:
        self._tokenizer, self._template = tokenizer, template
        vocabulary = vocabulary_of(tokenizer)
        texts = ((token, vocabulary.token_bytes[token].decode()) for token in sorted(vocabulary.special))
        self._endings = {text: token for token, text in texts if text}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, without added special tokens."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def turns(self, recorded: Conversation) -> Iterator[RecordedTurn]:
        """Yield every answer that is not empty, in order.

        Raises:
            ConfigError: the template does not render an answer after its own generation prompt.
        """
        known_text, known_tokens, waits = "", list[int](), iter(recorded.waits)
        for index, message in enumerate(recorded.messages):
            if message["role"] == "assistant":
                wait, free = next(waits, 0.0), message.get("tokens", 0)
                prompt_text = self._render(recorded, index, prompt=True)
                answer_text, ending = self._answer(recorded, index, prompt_text)
                prompt = self._extend(known_text, known_tokens, prompt_text)
                answer = self.encode(answer_text)
                known_text, known_tokens = prompt_text + answer_text, prompt + answer
                if answer:
                    yield RecordedTurn(prompt, [*answer, ending], wait=wait)
                elif free:
                    yield RecordedTurn(prompt, [], wait=wait, free=free)

    def _render(self, recorded: Conversation, count: int, prompt: bool) -> str:
        hidden = ("reasoning_content", "tokens")
        served = map(served_message, recorded.messages[:count])
        shown = [{k: v for k, v in message.items() if k not in hidden} for message in served]
        options: dict[str, Any] = {"tools": served_tools(recorded.id, recorded.tools), "tokenize": False}
        options |= {"add_generation_prompt": prompt, "chat_template": self._template}
        try:
            text: str = self._tokenizer.apply_chat_template(shown, **options)
        except (TemplateError, *NOT_AS_WRITTEN) as error:
            raise ConfigError(f"{recorded.id}: the chat template refuses its messages: {error}") from None
        return text

    def _answer(self, recorded: Conversation, index: int, prompt: str) -> tuple[str, int]:
        """Return an answer's text and the token that ends it: its last special one; text after it is the template's."""
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

    def _extend(self, known_text: str, known_tokens: list[int], text: str) -> list[int]:
        """Return the tokens of `text`. If a special token follows the known text in it, only the rest is encoded."""
        rest = text.removeprefix(known_text) if known_text else ""
        if rest and len(rest) < len(text) and rest.startswith(tuple(self._endings)):
            return known_tokens + self.encode(rest)
        return self.encode(text)


def renderer_of(target: Path, bundle: Path) -> Renderer:
    """Return a renderer with a target's tokenizer, and with the bundle's chat template if it has one."""
    from transformers import AutoTokenizer

    template = load_manifest(bundle).chat_template
    text = None if template is None else (bundle / template).read_text(encoding="utf-8")
    return Renderer(AutoTokenizer.from_pretrained(target), text)


MAX_BYTES = 1 << 30
"""Most bytes of one file."""

Record = tuple[str, str, Any]
"""A record of a file: its place for errors, a name, and its JSON."""

KNOWN = "OpenAI messages, LMCache's calls, agentic-trace, or runs of tau-bench, tau2, SWE-agent, mini-swe-agent"


def read_recorded(path: Path) -> list[Conversation]:
    """Read the conversations of a file that have a recorded answer, in the file's order.

    The file has JSON lines, one JSON list of records, or one record.

    Raises:
        ConfigError: the file cannot be read, is no JSON, or a record is of no known format; it names file, line or
            record, and field. Also where no conversation has an answer.
    """
    conversations = []
    records = (record_of_file for record in _records(path) for record_of_file in _unpacked(*record))
    for where, name, record in _joined(records):
        reader = next((reader for fits, reader in FORMATS if fits(record)), None)
        if reader is None:
            raise ConfigError(f"{where}: of no known format ({KNOWN})")
        read = reader(where, name, record)
        if read.answers:
            conversations.append(read)
    if not conversations:
        raise ConfigError(f"{path}: holds no recorded answer of an assistant")
    return conversations


def _records(path: Path) -> Iterator[Record]:
    """Yield a file's records, each after its place in the file, as text for errors, and a name."""
    text = read_text(path, MAX_BYTES)
    lines = list(lines_of(text))
    if path.suffix == ".jsonl" or (len(lines) > 1 and _stands_alone(lines[0][1])):
        for number, line in lines:
            yield f"{path}, line {number}", f"{path.stem}-{number}", _parse(line, f"{path}, line {number}")
        return
    document = _parse(text, str(path))
    if isinstance(document, list) and not _is_swe_agent(document):
        for index, record in enumerate(document):
            yield f"{path}, record {index}", f"{path.stem}-{index}", record
    else:
        yield str(path), path.stem.removesuffix(".traj"), document


def _stands_alone(line: str) -> bool:
    """Whether a file's first line is a record by itself."""
    try:
        return isinstance(read_json(line, finite=False), dict)
    except ValueError:
        return False


def _parse(text: str, where: str) -> Any:
    try:
        return read_json(text, finite=False)
    except json.JSONDecodeError as error:
        place = where if error.lineno == 1 else f"{where}, line {error.lineno}"
        raise ConfigError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from None


# tau2-bench

_ENVIRONMENT = "tau2_environment"
_USER = "user"


def _unpacked(where: str, name: str, document: Any) -> Iterator[Record]:
    """Yield the simulations of a tau2-bench document, or the conversations of an agentic trace, as records, with places
    and names; any other document as it is."""
    if isinstance(document, dict) and "conversations" in document:
        for index, turns in enumerate(list_of(f"{where}, conversations", document["conversations"])):
            place = f"{where}, conversations[{index}]"
            yield place, f"{name}-{index}", _agentic(place, list_of(place, turns))
        return
    if not isinstance(document, dict) or "simulations" not in document:
        yield where, name, document
        return
    info = object_of(f"{where}, info", document.get("info"))
    for index, simulation in enumerate(list_of(f"{where}, simulations", document["simulations"])):
        place = f"{where}, simulations[{index}]"
        yield place, name, {**object_of(place, simulation), _ENVIRONMENT: info.get("environment_info")}


def _tau2(where: str, name: str, record: dict[str, Any]) -> Conversation:
    """Read one simulation of a tau2-bench document `{info, tasks, simulations}`.

        {"info": {"environment_info": {"domain_name", "policy", "tool_defs"}},
         "simulations": [{"task_id", "trial", "messages": [{"role", "content", "requestor", "timestamp",
                          "tool_calls": [{"id", "name", "arguments", "requestor"}]}, ...]}, ...]}

    The user may call tools, too; neither these calls nor their results are seen by the agent. Nothing else of `info` is
    read. Source: sierra-research/tau2-bench, `web/leaderboard/public/submissions/*/trajectories` at commit 52a4ed7b:
    later commits have no trajectories.
    """
    environment = object_of(f"{where}, info.environment_info", record[_ENVIRONMENT] or {})
    policy = text_of(f"{where}, info.environment_info.policy", environment.get("policy"))
    domain = text_of(f"{where}, info.environment_info.domain_name", environment.get("domain_name"))
    messages: list[object] = [{"role": "system", "content": policy}] if policy else []
    for index, raw in enumerate(list_of(f"{where}, messages", record.get("messages"))):
        message = object_of(f"{where}, messages[{index}]", raw)
        silent = message.get("role") == _USER and message.get("tool_calls") and not message.get("content")
        if message.get("requestor") != _USER and not silent:
            messages.append(_tau2_message(f"{where}, messages[{index}]", message))
    return _trial(where, name, record, f"tau2 {domain}".strip(), messages, environment.get("tool_defs"))


def _trial(
    where: str, name: str, record: dict[str, Any], category: str, messages: list[Any], tools: object = None
) -> Conversation:
    task = f"task {record.get('task_id')}"
    identity = f"{name}/{task} trial {record.get('trial', 0)}"
    return replace(conversation(where, identity, category, messages, tools), task=f"{category} {task}")


def _tau2_message(where: str, message: Message) -> Message:
    calls = list_of(f"{where}.tool_calls", message.get("tool_calls") or [])
    if message.get("role") == "tool":
        return {**message, "tool_call_id": message.get("id")}
    made = [object_of(f"{where}.tool_calls[{i}]", entry) for i, entry in enumerate(calls)]
    return {**message, "tool_calls": [call(entry.get("name", ""), entry.get("arguments")) for entry in made]}


# SWE-agent


def _is_swe_agent(record: Any) -> bool:
    if isinstance(record, list):
        return bool(record) and all(isinstance(entry, dict) and "role" in entry for entry in record)
    if not isinstance(record, dict):
        return False
    if "trajectory_format" in record and "messages" in record:
        return True
    history = record.get("history")
    return isinstance(history, list) and any(isinstance(entry, dict) and "role" in entry for entry in history)


def _swe_agent(where: str, name: str, record: Any) -> Conversation:
    """Read a trajectory of SWE-agent (`*.traj`: `history`) or mini-swe-agent (`*.traj.json`: `messages`, or a list).

    Source: SWE-agent/SWE-agent, `docs/usage/trajectories.md` and `trajectories/demonstrations/`;
    SWE-agent/mini-swe-agent, `docs/usage/output_files.md`. Messages are in OpenAI's form; demonstrations that were
    shown to the model come as one message, and what the agent's driver noted when it ended (`role: exit`) was never
    sent.
    """
    trajectory: dict[str, Any] = {"messages": record} if isinstance(record, list) else record
    key = "messages" if "messages" in trajectory else "history"
    messages = [
        entry
        for entry in list_of(f"{where}, {key}", trajectory[key])
        if not (isinstance(entry, dict) and entry.get("role") == "exit")
    ]
    task = text_of(f"{where}, instance_id", trajectory.get("instance_id"))
    read = replace(conversation(where, task or name, "SWE-agent", messages), task=task)
    steps = trajectory.get("trajectory")
    timed = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    ran = [_moment({"timestamp": step.get("execution_time")}) for step in timed]
    whole = len(ran) == read.answers and all(seconds >= 0 for seconds in ran)
    return replace(read, waits=(0.0, *ran[:-1])) if whole else read


# tau-bench, SGLang's agentic traces, LMCache's calls


def _tau_bench(where: str, name: str, record: dict[str, Any]) -> Conversation:
    """Read one run of tau-bench, `{"task_id", "trial", "traj": [...]}`, whose messages are in OpenAI's form.

    Source: sierra-research/tau-bench, `historical_trajectories/`, which do not list the tools.
    """
    return _trial(where, name, record, "tau-bench", list_of(f"{where}, traj", record["traj"]))


AGENTIC_TOKENS = 220
"""Tokens of each answer of an agentic trace, as in SGLang's loader: a trace has no answers."""


def _agentic(where: str, turns: Sequence[object]) -> dict[str, Any]:
    """Return one conversation of `{"conversations": [[{"messages": [...]}, ...]]}` as a record with empty answers.

    A turn's messages are those that are new. Source: SGLang, `sglang/benchmark/datasets/agentic_trace.py`.
    """
    messages: list[object] = []
    for index, turn in enumerate(turns):
        said = object_of(f"{where}[{index}]", turn).get("messages")
        messages += list_of(f"{where}[{index}].messages", said or [])
        if said:
            messages.append({"role": "assistant", "content": "", "tokens": AGENTIC_TOKENS})
    return {"category": "agentic-trace", "messages": messages}


def _joined(records: Iterable[Record]) -> Iterator[Record]:
    """Yield records; the calls of an LMCache session become OpenAI records, one a conversation.

        {"timestamp": 1760428436442742, "input": "…", "output": "…", "session_id": "…"}

    An input is a whole prompt as text. It continues the call whose input it begins with, or opens a conversation; the
    session's later conversations are subagents of its first. The time to a session's next call includes that of the
    recorded answer. Source: LMCache/lmcache-agent-trace, which orders no lines and leaves answers out of some inputs.
    """
    sessions = defaultdict[str, list[Record]](list)
    for where, name, record in records:
        if isinstance(record, dict) and {"input", "output", "session_id", "timestamp"} <= record.keys():
            session = text_of(f"{where}, session_id", record["session_id"])
            asked = text_of(f"{where}, input", record["input"])
            output = text_of(f"{where}, output", record["output"])
            if asked and output:
                sessions[session].append((where, asked, {**record, "output": output}))
        else:
            yield where, name, record
    for session, calls in sessions.items():
        talks: dict[str, list[Message]] = {}
        opened: list[dict[str, Any]] = []
        for _, asked, record in sorted(calls, key=lambda made: _moment(made[2])):
            before = max((text for text in talks if asked.startswith(text) and asked != text), key=len, default="")
            messages = talks.pop(before, [])
            if not messages:
                after = len(opened[0]["messages"]) // 2 if opened else 0
                parent = {"parent": session, "after": after} if opened else {}
                name = f"{session}-{len(opened) + 1}" if opened else session
                opened.append({"id": name, "category": "LMCache", "messages": messages, **parent})
            said, at = asked.removeprefix(before), {"timestamp": _moment(record) / 1e6}
            if messages:
                begin, quoted, rest = said.partition(messages[-1]["content"])
                said = rest if quoted and begin.strip() in ("", "assistant:") else said
            messages += [{"role": "user", "content": said, **at}]
            messages += [{"role": "assistant", "content": record["output"], **at}]
            talks[asked] = messages
        for one in opened:
            yield f"{calls[0][0]}, session {session}", session, one


# OpenAI's messages


def _openai_log(where: str, name: str, record: dict[str, Any]) -> Conversation:
    """Read one conversation, or one request with its response, in OpenAI's form.

        {"messages": [{"role", "content", "timestamp", ...}], "tools": [...], "prediction": {...}, "id": "…",
         "category": "…", "task": "…", "parent": "…", "after": 1}
        {"request": {"messages": [...], "tools": [...]}, "response": {"choices": [{"message": {...}}]}}

    Gateways log the second form; the first choice is the recorded answer. A prediction is of the last answer.
    `parent` and `after` are of a subagent.
    """
    if "messages" in record:
        request, messages = record, list_of(f"{where}, messages", record["messages"])
    else:
        request = object_of(f"{where}, request", record["request"])
        answer = _message_of(f"{where}, response", record.get("response"))
        messages = [*list_of(f"{where}, request.messages", request.get("messages")), answer]
    logged = conversation(
        where,
        text_of(f"{where}, id", record.get("id")) or name,
        text_of(f"{where}, category", record.get("category")) or "log",
        messages,
        request.get("tools"),
    )
    parent, after = text_of(f"{where}, parent", record.get("parent")), record.get("after", 0)
    if parent and not (isinstance(after, int) and after > 0):
        raise ConfigError(
            f"{where}, after: {after!r} is no count of answers of {parent!r}; a subagent begins after one or more"
        )
    try:
        prediction = body_prediction(request)
    except HintError as error:
        raise ConfigError(f"{where}, {error}") from None
    task = text_of(f"{where}, task", record.get("task"))
    return replace(logged, prediction=prediction, parent=(parent, after) if parent else None, task=task)


def _message_of(where: str, response: object) -> Message:
    """Return the message of a response's first choice."""
    choices = list_of(f"{where}.choices", object_of(where, response).get("choices"))
    choice = object_of(f"{where}.choices[0]", choices[0] if choices else None)
    return object_of(f"{where}.choices[0].message", choice.get("message"))


FORMATS: tuple[tuple[Callable[[Any], bool], Callable[[str, str, Any], Conversation]], ...] = (
    (lambda record: isinstance(record, dict) and _ENVIRONMENT in record, _tau2),
    (lambda record: isinstance(record, dict) and "traj" in record, _tau_bench),
    (_is_swe_agent, _swe_agent),
    (lambda record: isinstance(record, dict) and ("messages" in record or "request" in record), _openai_log),
)
"""(whether a record has a format, its reader). The first that fits reads the record; the last is the most general."""

"""Recorded files of any format that is known, as conversations.

A reader takes a record's place in its file, a name and the record, and raises `RecordError` naming the field that is
wrong.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from whiflash_sglang.jsonl import lines_of, read_json
from whiflash_sglang.lab.recorded.conversation import (
    Conversation,
    Message,
    RecordError,
    call,
    conversation,
    list_of,
    object_of,
    text_of,
)
from whiflash_sglang.spans.hints import HintError
from whiflash_sglang.spans.prediction import body_prediction

MAX_BYTES = 1 << 30
"""Of one file."""

KNOWN = "OpenAI messages, or trajectories of tau2, SWE-agent or mini-swe-agent"


def read_recorded(path: Path) -> list[Conversation]:
    """Conversations of a file with at least one recorded answer, in its order.

    JSON lines, one JSON list of records, or one record.

    Raises:
        RecordError: the file cannot be read, is no JSON, or a record is of no known format; it names file, line or
            record, and field. Also where no conversation has an answer.
    """
    found = []
    records = (part for record in _records(path) for part in _unpacked(*record))
    for where, name, record in records:
        reader = next((reader for fits, reader in FORMATS if fits(record)), None)
        if reader is None:
            raise RecordError(f"{where}: of no known format ({KNOWN})")
        read = reader(where, name, record)
        if read.answers:
            found.append(read)
    if not found:
        raise RecordError(f"{path}: holds no recorded answer of an assistant")
    return found


def _records(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Its place, a name, and the record."""
    text = _text(path)
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


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RecordError(f"{path}: {size} bytes; at most {MAX_BYTES} are read")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} cannot be read: {error}") from None


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
        raise RecordError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    except ValueError as error:
        raise RecordError(f"{where}: not JSON ({error})") from None


# tau2-bench

_ENVIRONMENT = "tau2_environment"
_USER = "user"


def _unpacked(where: str, name: str, document: Any) -> Iterator[tuple[str, str, Any]]:
    """The simulations of a document of tau2-bench as records, with places and names; other documents as such."""
    if not isinstance(document, dict) or "simulations" not in document:
        yield where, name, document
        return
    info = object_of(f"{where}, info", document.get("info"))
    for index, given in enumerate(list_of(f"{where}, simulations", document["simulations"])):
        place = f"{where}, simulations[{index}]"
        yield place, name, {**object_of(place, given), _ENVIRONMENT: info.get("environment_info")}


def _tau2(where: str, name: str, record: dict[str, Any]) -> Conversation:
    """One simulation of a document of `{info, tasks, simulations}`.

        {"info": {"environment_info": {"domain_name", "policy", "tool_defs"}},
         "simulations": [{"task_id", "trial", "messages": [{"role", "content", "requestor",
                          "tool_calls": [{"id", "name", "arguments", "requestor"}]}, ...]}, ...]}

    The user may call tools, too; neither these calls nor their results are seen by the agent. Nothing else of `info` is
    read. Source: sierra-research/tau2-bench, `web/leaderboard/public/submissions/*/trajectories`.
    """
    environment = object_of(f"{where}, info.environment_info", record[_ENVIRONMENT] or {})
    policy = text_of(f"{where}, info.environment_info.policy", environment.get("policy"))
    domain = text_of(f"{where}, info.environment_info.domain_name", environment.get("domain_name"))
    messages: list[object] = [{"role": "system", "content": policy}] if policy else []
    for index, given in enumerate(list_of(f"{where}, messages", record.get("messages"))):
        message = object_of(f"{where}, messages[{index}]", given)
        if message.get("requestor") != _USER and not _only_calls(message):
            messages.append(_tau2_message(f"{where}, messages[{index}]", message))
    found = f"{name}/task {record.get('task_id')} trial {record.get('trial', 0)}"
    return conversation(where, found, f"tau2 {domain}".strip(), messages, environment.get("tool_defs"))


def _only_calls(message: Message) -> bool:
    """Whether a user calls a tool and says nothing."""
    return message.get("role") == _USER and bool(message.get("tool_calls")) and not message.get("content")


def _tau2_message(where: str, given: Message) -> Message:
    calls = list_of(f"{where}.tool_calls", given.get("tool_calls") or [])
    if given.get("role") == "tool":
        return {**given, "tool_call_id": given.get("id")}
    made = [object_of(f"{where}.tool_calls[{i}]", one) for i, one in enumerate(calls)]
    return {**given, "tool_calls": [call(one.get("name", ""), one.get("arguments")) for one in made]}


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
    """Trajectories of SWE-agent (`*.traj`: `history`) and mini-swe-agent (`*.traj.json`: `messages`, or a bare list).

    Source: SWE-agent/SWE-agent, `docs/usage/trajectories.md` and `trajectories/demonstrations/`;
    SWE-agent/mini-swe-agent, `docs/usage/output_files.md`. Messages are in OpenAI's form; demonstrations that were
    shown to the model come as one message, and what the agent's driver noted when it ended (`role: exit`) was never
    sent.
    """
    given: dict[str, Any] = {"messages": record} if isinstance(record, list) else record
    key = "messages" if "messages" in given else "history"
    messages = [
        entry
        for entry in list_of(f"{where}, {key}", given[key])
        if not (isinstance(entry, dict) and entry.get("role") == "exit")
    ]
    name = text_of(f"{where}, instance_id", given.get("instance_id")) or name
    return conversation(where, name, "SWE-agent", messages)


# OpenAI's messages


def _openai_log(where: str, name: str, record: dict[str, Any]) -> Conversation:
    """One conversation, or one request with its response, on a line.

        {"messages": [...], "tools": [...], "prediction": {...}, "id": "…", "category": "…"}
        {"request": {"messages": [...], "tools": [...]}, "response": {"choices": [{"message": {...}}]}}

    Gateways log the second form; the first choice is the recorded answer. A prediction is of the last answer.
    """
    if "messages" in record:
        given, messages = record, list_of(f"{where}, messages", record["messages"])
    else:
        given = object_of(f"{where}, request", record["request"])
        answer = _message_of(f"{where}, response", record.get("response"))
        messages = [*list_of(f"{where}, request.messages", given.get("messages")), answer]
    found = conversation(
        where,
        text_of(f"{where}, id", record.get("id")) or name,
        text_of(f"{where}, category", record.get("category")) or "log",
        messages,
        given.get("tools"),
    )
    try:
        return replace(found, prediction=body_prediction(given))
    except HintError as error:
        raise RecordError(f"{where}, {error}") from None


def _message_of(where: str, response: object) -> Message:
    """The message of a response's first choice."""
    choices = list_of(f"{where}.choices", object_of(where, response).get("choices"))
    choice = object_of(f"{where}.choices[0]", choices[0] if choices else None)
    return object_of(f"{where}.choices[0].message", choice.get("message"))


FORMATS: tuple[tuple[Callable[[Any], bool], Callable[[str, str, Any], Conversation]], ...] = (
    (lambda record: isinstance(record, dict) and _ENVIRONMENT in record, _tau2),
    (_is_swe_agent, _swe_agent),
    (lambda record: isinstance(record, dict) and ("messages" in record or "request" in record), _openai_log),
)
"""Whether a record is of a format, and its reader. The first that fits reads it: the last is the least particular."""

"""Recorded files of any format that is known, as conversations."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from whiflash_sglang.jsonl import lines_of
from whiflash_sglang.lab.recorded import bfcl, openai_log, openhands, swe_agent, tau_bench
from whiflash_sglang.lab.recorded.conversation import Conversation, RecordError, tools_of

MAX_BYTES = 1 << 30
"""Of one file."""

FORMATS = (tau_bench, bfcl, openhands, swe_agent, openai_log)
"""In this order the first one that fits reads a record: the last is the least particular."""

KNOWN = (
    "tau-bench trajectories, BFCL multi-turn results, SWE-agent, mini-swe-agent and OpenHands trajectories, "
    "OpenAI messages"
)


def read_recorded(path: Path) -> list[Conversation]:
    """Conversations of a file with at least one recorded answer, in its order.

    JSON lines, one JSON list of records, or one record.

    Raises:
        RecordError: the file cannot be read, is no JSON, or a record is of no known format; it names file, line or
            record, and field. Also where no conversation has an answer.
    """
    found = []
    for where, name, record in _records(path):
        reader = next((form for form in FORMATS if form.fits(record)), None)
        if reader is None:
            raise RecordError(f"{where}: of no known format ({KNOWN})")
        read = reader.read(where, name, record)
        if read.answers:
            found.append(read)
    if not found:
        raise RecordError(f"{path}: holds no recorded answer of an assistant")
    return found


def read_tools(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Tools in OpenAI's form, a JSON list of them.

    Raises:
        RecordError: the file cannot be read, is no JSON, or holds no tools; it names the file and the field.
    """
    return tools_of(str(path), _parse(_text(path), str(path)))


def _records(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Where it stands, a name, and the record."""
    text = _text(path)
    lines = list(lines_of(text))
    if path.suffix == ".jsonl" or (len(lines) > 1 and _stands_alone(lines[0][1])):
        for number, line in lines:
            yield f"{path}, line {number}", f"{path.stem}-{number}", _parse(line, f"{path}, line {number}")
        return
    document = _parse(text, str(path))
    if isinstance(document, list) and not swe_agent.fits(document):
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
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where if error.lineno == 1 else f"{where}, line {error.lineno}"
        raise RecordError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise RecordError(f"{where}: nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise RecordError(f"{where}: not JSON ({error})") from None

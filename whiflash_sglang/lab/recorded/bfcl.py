"""BFCL's multi-turn results: one task on a line, the conversation in `inference_log`.

    {"id": "multi_turn_base_0", "result": [...], "inference_log": [
        [{"role": "state_info", ...}],
        {"begin_of_turn_query": [{"role": "user", ...}],
         "step_0": [{"role": "assistant", "content": [{"ls": "{\"a\": true}"}]}, {"role": "handler_log", ...},
                    {"role": "tool", "content": "…"}], "step_1": [...]}, ...]}

A function-calling model's answer is a list of `{name: arguments}`, a prompted model's is text. Source: ShishirPatil/
gorilla, `bfcl_eval/model_handler/base_handler.py` (`inference_multi_turn_FC`, `inference_multi_turn_prompting`). The
tools are not recorded.
"""

from collections.abc import Iterator
from typing import Any

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

CATEGORY = "BFCL multi-turn"
_STEP = "step_"


def fits(record: Any) -> bool:
    """Whether a record looks like one of this format."""
    return isinstance(record, dict) and "inference_log" in record


def read(where: str, name: str, record: dict[str, Any]) -> Conversation:
    """Raises `RecordError` naming the field that is wrong."""
    messages: list[object] = []
    for index, turn in enumerate(list_of(f"{where}, inference_log", record["inference_log"])):
        if isinstance(turn, list):  # the environment's state, between turns
            continue
        place = f"{where}, inference_log[{index}]"
        asked = object_of(place, turn).get("begin_of_turn_query")
        messages += list_of(f"{place}.begin_of_turn_query", asked)
        for key in sorted((key for key in turn if key.startswith(_STEP)), key=lambda k: _number(place, k)):
            messages += _step(f"{place}.{key}", turn[key])
    return conversation(where, text_of(f"{where}, id", record.get("id")) or name, CATEGORY, messages)


def _number(place: str, key: str) -> int:
    number = key.removeprefix(_STEP)
    if not (number.isascii() and number.isdigit()):
        raise RecordError(f"{place}.{ascii(key[:32])[1:-1]}: steps are numbered")
    return int(number)


def _step(place: str, entries: object) -> Iterator[Message]:
    for index, raw in enumerate(list_of(place, entries)):
        entry = object_of(f"{place}[{index}]", raw)
        if entry.get("role") == "assistant":
            yield _assistant(f"{place}[{index}].content", entry)
        elif entry.get("role") == "tool":
            yield entry


def _assistant(place: str, entry: Message) -> Message:
    content = entry.get("content")
    message: Message = {"role": "assistant", "reasoning_content": entry.get("reasoning_content")}
    if isinstance(content, list):
        calls = [object_of(f"{place}[{i}]", one) for i, one in enumerate(content)]
        message["tool_calls"] = [call(name, given) for one in calls for name, given in one.items()]
    else:
        message["content"] = content
    return message

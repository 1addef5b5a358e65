"""Plain OpenAI message logs: one conversation, or one request with its response, on a line.

    {"messages": [...], "tools": [...], "prediction": {...}, "id": "…", "category": "…"}
    {"request": {"messages": [...], "tools": [...]}, "response": {"choices": [{"message": {...}}]}}

The second form is what gateways log; the first choice is the recorded answer. A prediction is of the last answer.
"""

from dataclasses import replace
from typing import Any

from whiflash_sglang.lab.recorded.conversation import (
    Conversation,
    RecordError,
    conversation,
    list_of,
    object_of,
    text_of,
)
from whiflash_sglang.spans.hints import HintError
from whiflash_sglang.spans.prediction import body_prediction

CATEGORY = "log"


def fits(record: Any) -> bool:
    """Whether a record looks like one of this format."""
    return isinstance(record, dict) and ("messages" in record or "request" in record)


def read(where: str, name: str, record: dict[str, Any]) -> Conversation:
    """Raises `RecordError` naming the field that is wrong."""
    if "messages" in record:
        given, messages = record, list_of(f"{where}, messages", record["messages"])
    else:
        given = object_of(f"{where}, request", record["request"])
        answer = _answer(f"{where}, response", record.get("response"))
        messages = [*list_of(f"{where}, request.messages", given.get("messages")), answer]
    found = conversation(
        where,
        text_of(f"{where}, id", record.get("id")) or name,
        text_of(f"{where}, category", record.get("category")) or CATEGORY,
        messages,
        given.get("tools"),
    )
    return replace(found, prediction=_prediction(where, given))


def _prediction(where: str, given: dict[str, Any]) -> str | None:
    try:
        return body_prediction(given)
    except HintError as error:
        raise RecordError(f"{where}, {error}") from None


def _answer(where: str, response: object) -> object:
    choices = list_of(f"{where}.choices", object_of(where, response).get("choices"))
    choice = object_of(f"{where}.choices[0]", choices[0] if choices else None)
    return object_of(f"{where}.choices[0].message", choice.get("message"))

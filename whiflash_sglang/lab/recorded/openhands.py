"""OpenHands' trajectories: `history` of events, an action followed by its observation.

    {"instance_id": "…", "history": [
        {"action": "system", "args": {"content": "…", "tools": [...]}},
        {"action": "message", "source": "user", "args": {"content": "…"}},
        {"action": "run", "source": "agent", "tool_call_metadata": {"tool_call_id": "…",
            "model_response": {"id": "…", "choices": [{"message": {...}}]}}},
        {"observation": "run", "content": "…", "tool_call_metadata": {"tool_call_id": "…"}}]}

A response with several calls is recorded with every one of its actions, and read once. Older files hold pairs
`[action, observation]`. Source: All-Hands-AI/OpenHands, `openhands/events/serialization/`, and the `output.jsonl` of
its evaluations. Events without text of the conversation (states, recalls, condensations) are left out.
"""

from collections.abc import Iterator
from typing import Any

from whiflash_sglang.lab.recorded.conversation import (
    Conversation,
    Message,
    conversation,
    list_of,
    object_of,
    text_of,
)

CATEGORY = "OpenHands"


def fits(record: Any) -> bool:
    """Whether a record looks like one of this format."""
    history = record.get("history") if isinstance(record, dict) else None
    if not isinstance(history, list):
        return False
    first = next(iter(history), None)
    return isinstance(first, list) or (
        isinstance(first, dict) and bool({"action", "observation"} & set(first))
    )


def read(where: str, name: str, record: dict[str, Any]) -> Conversation:
    """Raises `RecordError` naming the field that is wrong."""
    messages: list[object] = []
    tools: object = None
    answered: set[str] = set()
    for place, event in _events(f"{where}, history", record["history"]):
        if event.get("action") == "system":
            args = object_of(f"{place}.args", event.get("args"))
            tools = args.get("tools")
            messages.append({"role": "system", "content": args.get("content")})
        elif "action" in event:
            messages += _action(place, event, answered)
        elif event.get("tool_call_metadata") is not None:
            called = object_of(f"{place}.tool_call_metadata", event["tool_call_metadata"])
            content = event.get("content")
            messages.append({"role": "tool", "content": content, "tool_call_id": called.get("tool_call_id")})
    name = text_of(f"{where}, instance_id", record.get("instance_id")) or name
    return conversation(where, name, CATEGORY, messages, tools)


def _events(where: str, history: object) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, entry in enumerate(list_of(where, history)):
        for event in entry if isinstance(entry, list) else [entry]:
            yield f"{where}[{index}]", object_of(f"{where}[{index}]", event)


def _action(place: str, event: dict[str, Any], answered: set[str]) -> Iterator[Message]:
    if event.get("tool_call_metadata") is not None:
        called = object_of(f"{place}.tool_call_metadata", event["tool_call_metadata"])
        response = object_of(f"{place}.tool_call_metadata.model_response", called.get("model_response"))
        response_id = text_of(f"{place}.tool_call_metadata.model_response.id", response.get("id"))
        if response_id in answered:
            return
        if response_id:
            answered.add(response_id)
        choices = list_of(f"{place}.tool_call_metadata.model_response.choices", response.get("choices"))
        choice = object_of(f"{place}.tool_call_metadata.model_response.choices[0]", next(iter(choices), None))
        message = object_of(
            f"{place}.tool_call_metadata.model_response.choices[0].message", choice.get("message")
        )
        yield {**message, "role": "assistant"}
    elif event.get("action") in ("message", "finish"):
        args = object_of(f"{place}.args", event.get("args"))
        content = args.get("content") if event["action"] == "message" else args.get("final_thought")
        if content:
            yield {"role": "user" if event.get("source") == "user" else "assistant", "content": content}

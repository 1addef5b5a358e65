"""Recorded conversations as `dag_jsonl`, which AIPerf replays against any OpenAI endpoint.

    {"session_id": "…", "context_mode": "message_array_with_responses",
     "turns": [{"messages": [...], "tools": [...]}, ...]}

A session is a conversation, a turn the request for one recorded answer: all messages before it, as recorded, so every
server is sent the same prompts whatever it answered. Source: aiperf 0.13.0, `dataset/loader/dag_jsonl_models.py`.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from whiflash_sglang.lab.recorded.conversation import Conversation, Message


def dag_lines(talks: Iterable[Conversation]) -> Iterator[str]:
    """A line for every conversation in which something was asked before an answer; names are told apart."""
    for number, talk in enumerate(talks):
        messages = list(_with_ids(talk.messages))
        tools = {"tools": list(talk.tools)} if talk.tools else {}
        turns = [
            {"messages": messages[:place], **tools}
            for place, message in enumerate(messages)
            if place and message["role"] == "assistant"
        ]
        if turns:
            mode = "message_array_with_responses"
            yield json.dumps({"session_id": f"{talk.id}-{number}", "context_mode": mode, "turns": turns})


def _with_ids(messages: Iterable[Message]) -> Iterator[dict[str, Any]]:
    """`messages` as servers take them: every call has an id, and results name theirs, in the order of the calls."""
    numbers, open_calls = itertools.count(), list[str]()
    for message in messages:
        if calls := message.get("tool_calls"):
            open_calls = [f"call_{next(numbers)}" for _ in calls]
            named = [{"id": name, **call} for name, call in zip(open_calls, calls, strict=True)]
            yield {**message, "tool_calls": named}
        elif message["role"] == "tool" and open_calls:
            yield {**message, "tool_call_id": open_calls.pop(0)}
        else:
            yield message

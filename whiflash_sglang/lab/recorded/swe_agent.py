"""Trajectories of SWE-agent (`*.traj`: `history`) and mini-swe-agent (`*.traj.json`: `messages`, or a bare list).

Source: SWE-agent/SWE-agent, `docs/usage/trajectories.md` and `trajectories/demonstrations/`;
SWE-agent/mini-swe-agent, `docs/usage/output_files.md`. Messages are in OpenAI's form; demonstrations that were shown
to the model come as one message, and what the agent's driver noted when it ended (`role: exit`) was never sent.
"""

from typing import Any

from whiflash_sglang.lab.recorded.conversation import Conversation, conversation, list_of, text_of

CATEGORY = "SWE-agent"


def fits(record: Any) -> bool:
    """Whether a record looks like one of this format."""
    if isinstance(record, list):
        return bool(record) and all(isinstance(entry, dict) and "role" in entry for entry in record)
    if not isinstance(record, dict):
        return False
    if "trajectory_format" in record and "messages" in record:
        return True
    history = record.get("history")
    return isinstance(history, list) and any(isinstance(entry, dict) and "role" in entry for entry in history)


def read(where: str, name: str, record: Any) -> Conversation:
    """Raises `RecordError` naming the field that is wrong."""
    given: dict[str, Any] = {"messages": record} if isinstance(record, list) else record
    key = "messages" if "messages" in given else "history"
    messages = [
        entry
        for entry in list_of(f"{where}, {key}", given[key])
        if not (isinstance(entry, dict) and entry.get("role") == "exit")
    ]
    name = text_of(f"{where}, instance_id", given.get("instance_id")) or name
    return conversation(where, name, CATEGORY, messages)

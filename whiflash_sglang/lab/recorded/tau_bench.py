"""tau-bench's results: a list of `{task_id, trial, reward, info, traj}`, `traj` in OpenAI's form.

Source: sierra-research/tau-bench, `historical_trajectories/` and what `run.py` writes. The tools are not recorded.
"""

from typing import Any

from whiflash_sglang.lab.recorded.conversation import Conversation, conversation, list_of

CATEGORY = "tau-bench"


def fits(record: Any) -> bool:
    """Whether a record looks like one of this format."""
    return isinstance(record, dict) and "traj" in record


def read(where: str, name: str, record: dict[str, Any]) -> Conversation:
    """Raises `RecordError` naming the field that is wrong."""
    if record.get("task_id") is not None:
        name = f"{name}/task {record['task_id']} trial {record.get('trial', 0)}"
    return conversation(where, name, CATEGORY, list_of(f"{where}, traj", record["traj"]))

"""The state of a server of several replicas."""

from typing import Any

from whiflash_sglang.replicas import together


def state(replica: int | None, rounds: int) -> dict[str, Any]:
    return {
        "policy": "auto",
        "arms": ["ar", "lookup"],
        "rounds": rounds,
        "draft_seconds": rounds / 2,
        "lookup": {"tenants": 1, "scopes": {"both": {"tokens": 1}, f"of {replica}": {"tokens": 2}}},
        "costs": {"verify": rounds / 100, "draft": {"ar": 0.5}},
        "replica": replica,
    }


def test_one_replica_is_the_server() -> None:
    assert together([state(None, 3)]) == {k: v for k, v in state(None, 3).items() if k != "replica"}


def test_replicas_are_told_apart_and_added_up() -> None:
    found = together([state(1, 4), state(0, 3)])
    assert (found["policy"], found["arms"], found["rounds"], found["draft_seconds"]) == (
        "auto",
        ["ar", "lookup"],
        7,
        3.5,
    )
    scopes = {"of 0": {"tokens": 2}, "both": {"tokens": 2}, "of 1": {"tokens": 2}}
    assert found["lookup"] == {"tenants": 2, "scopes": scopes}
    assert found["costs"] == {"verify": 0.035, "draft": {"ar": 0.5}}
    assert [(own["replica"], own["rounds"]) for own in found["replicas"]] == [(0, 3), (1, 4)]
    assert "replica" not in found

"""The state of a server of several replicas, and what is said of one that is missing."""

from typing import Any

import pytest

from whiflash_sglang.files.hosts import SilentReplicaError, together


def state(replica: int | None, rounds: int) -> dict[str, Any]:
    return {
        "policy": "auto",
        "arms": ["ar", "lookup"],
        "rounds": rounds,
        "draft_seconds": rounds / 2,
        "work": {"tenants": 1, "held": {"both": {"tokens": 1}, f"of {replica}": {"tokens": 2}}},
        "costs": {"verify": rounds / 100, "draft": {"ar": 0.5}},
        "replica": replica,
    }


def test_one_replica_is_the_server() -> None:
    assert together([state(None, 3)]) == {k: v for k, v in state(None, 3).items() if k != "replica"}


def test_replicas_are_told_apart_and_added_up() -> None:
    found = together([state(1, 4), state(0, 3)])
    assert (found["policy"], found["arms"]) == ("auto", ["ar", "lookup"])
    assert (found["rounds"], found["draft_seconds"]) == (7, 3.5)
    held = {"of 0": {"tokens": 2}, "both": {"tokens": 2}, "of 1": {"tokens": 2}}
    assert found["work"] == {"tenants": 2, "held": held}
    assert found["costs"] == {"verify": 0.035, "draft": {"ar": 0.5}}
    assert [(own["replica"], own["rounds"]) for own in found["replicas"]] == [(0, 3), (1, 4)]
    assert "replica" not in found


@pytest.mark.parametrize(
    ("heard", "size", "said"),
    [
        ({0}, 2, "replica 1 of 2 has not answered in 2.5 s"),
        ({1}, 4, "replicas 0, 2, 3 of 4 have not answered in 2.5 s"),
        ((), 1, "the scheduler has not answered in 2.5 s"),
    ],
)
def test_a_silent_replica_is_named(heard: set[int], size: int, said: str) -> None:
    assert str(SilentReplicaError(heard, size, 2.5)) == said

"""The replicas of a server: their states as one, and which of them is missing. Imports no SGLang."""

import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whiflash_sglang.errors import WhiflashError


class SilentReplicaError(WhiflashError):
    """A replica has not answered.

    Args:
        heard: numbers of those that have. size: replicas of the server. seconds: that it was waited.
    """

    def __init__(self, heard: Collection[int], size: int, seconds: float) -> None:
        silent = [number for number in range(size) if number not in heard]
        who = "the scheduler has"
        if size > 1:
            names = ", ".join(map(str, silent))
            who = f"replica {names} of {size} has" if len(silent) == 1 else f"replicas {names} of {size} have"
        super().__init__(f"{who} not answered in {seconds:g} s")


@dataclass(frozen=True, slots=True)
class Ended:
    """A process of a replica that is no more. replica: its number where it is known. code: of its exit, -N after
    signal N."""

    replica: int | None
    pid: int
    code: int

    def __str__(self) -> str:
        number = "a replica" if self.replica is None else f"replica {self.replica}"
        if self.code >= 0:
            return f"{number} (process {self.pid}) has ended with exit code {self.code}"
        try:
            by = signal.Signals(-self.code).name
        except ValueError:
            by = f"signal {-self.code}"
        return f"{number} (process {self.pid}) was ended by {by}"


class ReplicaDiedError(WhiflashError):
    """Some replicas will never answer what they were given.

    Args:
        ended: their processes; none where one has told of an error of its own and not ended yet. size: replicas.
    """

    def __init__(self, ended: Sequence[Ended], size: int) -> None:
        what = "; ".join(map(str, ended)) or "a replica has failed; its own error stands above"
        super().__init__(f"{what} (the server has {size})")


def together(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state, that of the only replica, or what all of them sum up to (`costs`: on average) with each one's own
    under `replicas`.

    Args:
        states: of every replica, with its number as `replica`; in any order, at least one.
    """
    ordered = sorted(states, key=lambda state: state["replica"] or 0)
    total = {**_sum(ordered), "costs": _mean([state["costs"] for state in ordered])}
    del total["replica"]
    return total if len(ordered) == 1 else {**total, "replicas": ordered}


def _mean(states: Sequence[Any]) -> Any:
    """Numbers on average, also those inside: what work costs does not add up."""
    if isinstance(states[0], Mapping):
        return {key: _mean([state[key] for state in states]) for key in states[0]}
    return sum(states) / len(states)


def _sum(states: Sequence[Any]) -> Any:
    """Numbers are added up, also those inside; what is no number is the same in all. Not all have every key."""
    first = states[0]
    if isinstance(first, Mapping):
        keys = dict.fromkeys(key for state in states for key in state)
        return {key: _sum([state[key] for state in states if key in state]) for key in keys}
    return sum(states) if isinstance(first, int | float) else first

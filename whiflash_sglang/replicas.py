"""The states of a server's replicas as one. Imports no SGLang."""

from collections.abc import Mapping, Sequence
from typing import Any


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

"""One engine, its policies in turn: what `test_targets.py` and `test_own_heads.py` ask of a target."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from engine import Engine
from reference import Comparison
from traffic import Arrival, play


def check_policies(
    e: Engine,
    comparison: Comparison,
    arrivals: Sequence[Arrival],
    expected: Mapping[str, list[int]],
    policies: Sequence[str],
) -> set[str | None]:
    """Text is `expected` under random routing for all `arrivals`, then under each policy for the first two.

    Returns the arms that drafted.
    """
    used: set[str | None] = set()
    for policy in ("random", *policies):
        e.worker.reconfigure({"router": policy})
        chosen = arrivals if policy == "random" else arrivals[:2]
        found = play(
            e,
            [replace(a, rid=f"{policy} {a.rid}") for a in chosen],
            lambda: used.update(*(state.counts for state in e.states.values())),
        )
        for a in chosen:
            comparison.check(a.prompt, expected[a.rid], found[f"{policy} {a.rid}"], f"{policy} {a.rid}")
    return used

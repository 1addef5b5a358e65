"""Whether what was learned drafts better than what serves, on the same answers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from whiflash_sglang.lab.statistics import Interval, paired_ratio
from whiflash_sglang.learner.pace import Pace
from whiflash_sglang.progress import tracked
from whiflash_sglang.train.answers.store import FeatureStore
from whiflash_sglang.train.replay import Pair, ReplayLog, replay_drafters
from whiflash_sglang.train.rounds import Tally, rounds


class Gain(NamedTuple):
    """before, after: tokens a round of a drafter alone, over all answers. ratio: of the two, with its interval."""

    before: float
    after: float
    ratio: Interval

    @property
    def better(self) -> bool:
        """Beyond its interval."""
        return self.ratio.low > 1


Walked = Mapping[str, Sequence[Tally]]
"""Arm → a tally for each answer."""


def walk_answers(pair: Pair, store: FeatureStore, log: ReplayLog, pace: Pace) -> Walked:
    """Walk every stored answer with each drafter alone, as a server would draft, verify and commit it.

    log: of the pair, for what was replayed before a killed walk.
    """
    found: dict[str, list[Tally]] = {arm: [] for arm in pair.drafters}
    for record in pace.each(tracked(store.records, "judging")):
        replayed = log.known.get(record.id)
        if replayed is None:
            replayed = replay_drafters(pair, store.read(record), store.layers)
            log.add(record.id, replayed)
        for arm, accepted in replayed.accepted.items():
            walked = rounds(0, len(accepted), lambda at, accepted=accepted: int(accepted[at]))  # type: ignore[misc]
            emitted = [tokens for _, tokens in walked]
            found[arm].append(Tally(len(emitted), sum(emitted)))
    return found


def gains(before: Walked, after: Walked) -> dict[str, Gain]:
    """By arm. Answers are drawn together for both, so what is hard for both cancels out."""
    return {name: _gain(before[name], after[name]) for name in after}


def _gain(before: Sequence[Tally], after: Sequence[Tally]) -> Gain:
    def column(tallies: Sequence[Tally], of: str) -> NDArray[np.float64]:
        return np.array([[getattr(tally, of)] for tally in tallies], dtype=np.float64)

    ratio = paired_ratio(
        column(after, "tokens"),
        column(after, "rounds"),
        column(before, "tokens"),
        column(before, "rounds"),
        [""] * len(after),
    )
    lengths = [
        float(column(tallies, "tokens").sum() / column(tallies, "rounds").sum())
        for tallies in (before, after)
    ]
    return Gain(lengths[0], lengths[1], ratio)

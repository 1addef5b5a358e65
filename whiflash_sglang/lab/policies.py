"""Policies that measurements compare others with; a server imports them only where its flag names one."""

import random
from dataclasses import dataclass

from whiflash_sglang import arms
from whiflash_sglang.routing.policies import Blind, Scores, in_order
from whiflash_sglang.routing.signals import Signals


@dataclass(frozen=True, slots=True)
class CopyRule(Blind):
    """The plain rule that better policies are measured against: copy where there is something to copy, else EAGLE-3."""

    candidates = frozenset({arms.LOOKUP, arms.AR})
    name: str = "copy-rule"
    needs: frozenset[str] = frozenset()

    def score(self, signals: Signals) -> Scores:
        return in_order((arms.LOOKUP, arms.AR), signals)


class RandomPolicy(Blind):
    """Switches at random every round. It exists to test that switching never changes text."""

    candidates = None
    name = "random"
    needs: frozenset[str] = frozenset()
    joins_arms = True

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def score(self, signals: Signals) -> Scores:
        choices = sorted(signals.allowed | {arms.NONE})
        return {arm: self._random.random() for arm in choices}


POLICIES = {"copy-rule": CopyRule, "random": RandomPolicy}

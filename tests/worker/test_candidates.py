"""Candidates: which are drafts at all, and which of several is verified."""

import math
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any
from unittest.mock import Mock

import pytest
from engine import engine
from model_set import Models
from oracle_arm import OracleArm
from plain import compare, plain_texts
from traffic import mixed, play, without_a_pass

from whiflash_sglang.drafts.candidates import Candidate, Part
from whiflash_sglang.prices.costs import FULL_LENGTH, Worth
from whiflash_sglang.records.core import History
from whiflash_sglang.records.request import Request
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.sources import DraftSources


def candidate(tokens: list[int], alive: list[float]) -> Candidate:
    return Candidate(tokens, alive, [Part("free", len(tokens))])


def test_only_what_could_be_drafts_is_verified() -> None:
    for bad in (candidate([4, 99, 2], [0.6, 0.5, 0.4]), candidate([4, 3, 2], [0.6, math.nan, 0.4])):
        assert bad.valid(99) == candidate([4], [0.6])
    assert candidate([4, -1], [0.6, 0.5]).valid(99).tokens == [4]
    right = candidate([5, 6, 7], [0.8, 0.4, 0.2])
    assert right.valid(8) == right
    held, request = Quarantine(["free"]), Request("r", running=True)
    round_ = Mock(requests=[request], most=[0], plan=Mock(worth=FULL_LENGTH))
    for vocabulary, faults in ((8, 0), (7, 1)):
        sources = DraftSources({}, held, vocabulary, Mock())
        assert sources.ask(round_, 0, Mock(arm="free", propose=Mock(return_value=right))) == right.valid(vocabulary)
        assert held.faults == {"free": faults}


class Free(OracleArm):
    """Proposes without a pass."""

    proposes = True

    def __init__(self, arm: str, seed: int) -> None:
        super().__init__(0.85, seed=seed)
        self.arm = arm

    def propose(
        self, request: Request, length: int, history: History, worth: Worth, under_way: int = 0
    ) -> Candidate | None:
        super().propose(request, length, history, worth, under_way)
        ahead = self._ahead[request.row][: self.max_drafts]
        tokens = [a if self._random.random() < self._accuracy else self._random.choice(self._alphabet) for a in ahead]
        chances = list(accumulate([0.8] * len(tokens), mul))
        if not tokens:
            return None
        return Candidate(tokens, chances, [Part(self.arm, len(tokens))], len(history(0)))


def test_without_a_pass_the_likeliest_candidate_is_verified(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates are as often right. The round counts for the one that says so, whichever comes first."""
    arrivals = mixed(seed=2, count=8, shared=40, tokens=60)
    expected = plain_texts(models.target, arrivals)
    arms = [Free(arm, seed).knowing(arrivals, expected) for arm, seed in (("free", 4), ("freer", 5))]
    propose = Free.propose

    def unsure(arm: Free, *asked: Any) -> Candidate | None:
        candidate = propose(arm, *asked)
        if candidate is None or arm.arm != "free":
            return candidate
        return candidate._replace(alive=[0.1] * len(candidate.alive))

    monkeypatch.setattr(Free, "propose", unsure)
    with engine(models.target, whiflash=models.whiflash("random"), arms=arms) as e:
        monkeypatch.setattr(e.worker.controller, "route", partial(without_a_pass, e.worker.controller))
        compare(models.reference.target, arrivals, expected, play(e, arrivals))
        rounds = {arm: counts.rounds for arm, counts in e.worker.tally.by_arm.items()}
    assert rounds["freer"] > 20
    assert rounds["free"] == 0

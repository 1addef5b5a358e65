"""The start-up profile of the drafters."""

from types import SimpleNamespace
from typing import Any

import torch
from whiflash_kernels import Drafts

from whiflash_sglang.arms.base import KVDrafter
from whiflash_sglang.cache.backlog import FeatureRings
from whiflash_sglang.device import clock
from whiflash_sglang.device.transfers import EXACT
from whiflash_sglang.engine.scheduler import pricing
from whiflash_sglang.prices.costs import MeasuredCosts
from whiflash_sglang.records.core import DraftBatch

SLOW, QUICK = 0.2, 0.002


class Disturbed(KVDrafter):
    """Every other of its drafts is held up by something else."""

    arm, max_drafts = "disturbed", 3

    def __init__(self) -> None:
        self.drafts, self.now = 0, 0.0

    def draft(self, batch: DraftBatch) -> Drafts:
        self.drafts += 1
        self.now += SLOW if self.drafts % 2 else QUICK
        return Drafts(torch.zeros((len(batch), 3), dtype=torch.int64), torch.full((len(batch),), 3), passes=3)


def test_something_else_at_the_start_does_not_make_an_arm_dear(monkeypatch: Any) -> None:
    target = SimpleNamespace(slot_table=torch.zeros((2, 64), dtype=torch.int32), context_len=64)
    sync: Any = SimpleNamespace(rings=FeatureRings(2, 8, 4, torch.float32, "cpu"))
    costs, drafter = MeasuredCosts(lambda arm: 4), Disturbed()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: drafter.now)
    pricing.Start(target, {"disturbed": drafter}, sync, EXACT, clock.HostClock(), 2).profile(costs)
    assert costs.draft("disturbed", 1) < SLOW / 2
    assert costs.draft("disturbed", 2) < SLOW / 2

"""The start-up profile of the drafters."""

from types import SimpleNamespace
from typing import Any

import torch
from whiflash_kernels import Drafts

from whiflash_sglang.arms.base import KVDrafter
from whiflash_sglang.cache.backlog import FeatureRings
from whiflash_sglang.device import clock
from whiflash_sglang.engine.scheduler import pricing
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
        return Drafts(torch.zeros((len(batch), 3), dtype=torch.int64), torch.full((len(batch),), 3))


def test_something_else_at_the_start_does_not_make_an_arm_dear(monkeypatch: Any) -> None:
    runner = SimpleNamespace(decode_cuda_graph_runner=None)
    table, device = torch.zeros((2, 64), dtype=torch.int32), torch.device("cpu")
    target: Any = SimpleNamespace(slot_table=table, context_len=64, device=device, runner=runner)
    sync: Any = SimpleNamespace(rings=FeatureRings(2, 8, 4, torch.float32, "cpu"))
    drafter = Disturbed()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: drafter.now)
    start = pricing.Start(target, {"disturbed": drafter}, sync, clock.Clock(), 2)
    for requests in (1, 2):
        assert start._pass(drafter, 3, requests) < SLOW / 2

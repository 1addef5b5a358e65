"""Costs of a draft pass on this machine, measured at the start, before the first request is routed."""

import time
from collections.abc import Iterable

import torch

from whiflash_sglang.arms.base import KVDrafter
from whiflash_sglang.cache.backlog import FeatureRings
from whiflash_sglang.device.transfers import EXACT, HostView
from whiflash_sglang.prices.costs import FULL_LENGTH, MeasuredCosts
from whiflash_sglang.records.core import DraftBatch

BATCHES = (1, 2, 4, 8)
CONTEXT = 32
"""Tokens that every request of the profile pretends to have."""

TIMINGS = 3
"""The fastest of so many counts: an arm that looks dear because something else ran at the start is timed again only by
probes, one that looks cheap by its next round.
"""


def profile_drafts(
    drafters: Iterable[KVDrafter],
    rings: FeatureRings,
    slot_table: torch.Tensor,
    costs: MeasuredCosts,
    host: HostView = EXACT,
) -> None:
    """Time drafts of arms with KV, for a few batch sizes, and pass the times to `costs`.

    Runs before any request: the slot table is empty, so every write goes to the engine's padding slot.

    Args:
        slot_table: [request rows, ctx] int32, all zero.
    """
    for drafter in drafters:
        for size in (size for size in BATCHES if size <= len(slot_table)):
            batch = idle_batch(size, drafter, rings, slot_table, host)
            drafter.draft(batch)  # The first run allocates.
            seconds, passes = min(_timed(drafter, batch) for _ in range(TIMINGS))
            costs.drafted(drafter.arm, size, passes, seconds)


def _timed(drafter: KVDrafter, batch: DraftBatch) -> tuple[float, int]:
    """Seconds of a draft and the passes it took."""
    device = batch.rows.device
    _wait(device)
    began = time.perf_counter()
    drafts = drafter.draft(batch)
    _wait(device)
    return time.perf_counter() - began, drafts.passes


def idle_batch(
    size: int, drafter: KVDrafter, rings: FeatureRings, slot_table: torch.Tensor, host: HostView
) -> DraftBatch:
    """A batch of so many requests that are none. slot_table: [request rows, ctx] int32, all zero."""
    rows = torch.arange(size, device=slot_table.device)
    starts, caps = torch.full_like(rows, CONTEXT), torch.full_like(rows, drafter.max_drafts)
    bonus = torch.zeros_like(rows)
    reads_tail, place = drafter.tail_width > 0, drafter.place(size)
    values = drafter.calibration((), FULL_LENGTH)
    calibration = torch.tensor(values, dtype=torch.float32, device=rows.device)
    rows, starts, bonus, caps, tail, calibration = rings.inputs(
        None, rows, starts, bonus, caps, calibration, drafter.features, tail=reads_tail, into=place
    )
    return DraftBatch(
        rows,
        starts,
        bonus,
        tail,
        slot_table,
        CONTEXT,
        caps,
        limits=[drafter.max_drafts] * size,
        row_ids=range(size),
        calibration=calibration,
        host=host,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

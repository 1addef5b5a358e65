"""The draft stage of a round: drafts of the whole batch side by side."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from whiflash_sglang.cache.sync import DraftSync
from whiflash_sglang.compat.spec_worker import RoundBatch
from whiflash_sglang.drafters.base import DraftBatch, Drafter, Drafts, Grown
from whiflash_sglang.host_view import HostView
from whiflash_sglang.metrics import RoundClock
from whiflash_sglang.planning import Plan
from whiflash_sglang.routing.costs import MeasuredCosts


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafts of the whole batch.

    tokens: [B, W] int64, padded. widths: [B] int64, rows each request verifies (drafts + 1). own: [B] int64, drafts of
    the request's own arm among them; confidences: [B, C] float32, what that arm gave them. rows: of the verification;
    stride: of its widest request, W + 1. Both are what the widths come to where the host may know them, else bounds.
    """

    tokens: torch.Tensor
    widths: torch.Tensor
    own: torch.Tensor
    confidences: torch.Tensor
    rows: int
    stride: int


@dataclass(frozen=True, slots=True)
class DraftStage:
    """The arms of a worker as its round sees them. slot_table: [request rows, ctx] int32."""

    drafters: Mapping[str, Drafter]
    sync: DraftSync
    costs: MeasuredCosts
    clock: RoundClock
    slot_table: torch.Tensor
    host: HostView

    def draft(self, requests: RoundBatch, plan: Plan) -> Proposal:
        """Each arm drafts for its own requests; the results are laid side by side."""
        size, device, rooms = len(plan.routes), requests.rows.device, plan.rooms
        tokens = torch.zeros((size, max(rooms)), dtype=torch.int64, device=device)
        counts = torch.zeros((2, size), dtype=torch.int64, device=device)
        confidences = torch.zeros((size, max(plan.limits)), dtype=torch.float32, device=device)
        for arm, members in plan.members.items():
            began, drafter = time.perf_counter(), self.drafters[arm]
            batch = self._batch(requests, plan, arm)
            drafts = drafter.draft(batch)
            seconds, catch_up = time.perf_counter() - began, self.sync.seconds.get(arm, 0.0)
            self.costs.drafted(arm, len(members), passes=drafts.passes, seconds=seconds, catch_up=catch_up)
            index, own = plan.on_device.members[arm], drafts.counts
            if drafts.confidences is not None:
                confidences[:, : drafts.confidences.shape[1]].index_copy_(0, index, drafts.confidences)
            drafts = self._prolonged(batch, drafts, plan, arm)
            width = min(drafts.tokens.shape[1], tokens.shape[1])
            tokens[:, :width].index_copy_(0, index, drafts.tokens[:, :width])
            counts.index_copy_(1, index, torch.stack([own, drafts.counts]))
            self.clock.drafted(time.perf_counter() - began + catch_up)
        widths = counts[1] + 1
        stride = self.host.size(widths.max(), 1 + max(rooms))
        rows = self.host.size(widths.sum(), size + sum(rooms))
        return Proposal(tokens[:, : stride - 1], widths, counts[0], confidences, rows, stride)

    def _prolonged(self, batch: DraftBatch, drafts: Drafts, plan: Plan, arm: str) -> Drafts:
        """The drafts of `arm`, and behind them what others know to follow, such as the copy that a chain leads into."""
        rooms = [plan.joined[i] for i in plan.members[arm]]
        if drafts.alive is None or not any(rooms):
            return drafts
        for other in self.drafters.values():
            if other.prolongs and other.arm != arm:
                room = plan.on_device.joined[plan.on_device.members[arm]]
                more = other.prolong(Grown(batch, drafts, rooms, room))
                drafts = drafts if more is None else _behind(drafts, more)
        return drafts

    def _batch(self, requests: RoundBatch, plan: Plan, arm: str) -> DraftBatch:
        members, index = plan.members[arm], plan.on_device.members[arm]
        rows, starts, bonus, caps = requests.rows, requests.starts, requests.bonus, plan.on_device.limits
        if len(members) < len(plan.routes):
            rows, starts, bonus, caps = (tensor[index] for tensor in (rows, starts, bonus, caps))
        return DraftBatch(
            rows=rows,
            row_ids=[requests.row_ids[i] for i in members],
            lengths=[requests.lengths.most[i] for i in members],
            starts=starts,
            bonus=bonus,
            tail=self.sync.rings.tail(rows, starts),
            slot_table=self.slot_table,
            limits=[plan.limits[i] for i in members],
            caps=caps,
            calibration=plan.on_device.calibration[arm],
            worth=plan.worth[arm],
            host=self.host,
        )


def _behind(drafts: Drafts, more: Drafts) -> Drafts:
    """`more` behind the drafts of every request: it overwrites padding only."""
    width = more.tokens.shape[1]
    column = drafts.counts[:, None] + torch.arange(width, device=drafts.counts.device)
    tokens = F.pad(drafts.tokens, (0, width)).scatter_(1, column, more.tokens)
    return replace(drafts, tokens=tokens, counts=drafts.counts + more.counts)

"""The draft stage of a round: drafts of the whole batch side by side."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F

from whiflash_sglang.cache.sync import DraftSync
from whiflash_sglang.compat.spec_worker import RoundBatch
from whiflash_sglang.drafters.base import DraftBatch, Drafter, Drafts, Grown
from whiflash_sglang.drafters.merging import behind, bucket_of, lay, likeliest
from whiflash_sglang.drafters.paged import PassInput
from whiflash_sglang.graphs import Recorder
from whiflash_sglang.host_view import HostView
from whiflash_sglang.metrics import RoundClock
from whiflash_sglang.planning import Plan, widest_of
from whiflash_sglang.routing.costs import MeasuredCosts


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafts of the whole batch.

    tokens: [B, W] int64, padded. widths: [B] int64, rows each request verifies (drafts + 1). own: [B] int64, drafts of
    the request's own arm among them; confidences: [B, C] float32, what that arm gave them. late: [B] int64, 1 where the
    drafts are those of `Plan.late` instead. rows: of the verification; stride: of its widest request, W + 1. Both are
    what the widths come to where the host may know them, else bounds. wanted: [B] int64, drafts that there were before
    the bound was kept to, where there is one.
    """

    tokens: torch.Tensor
    widths: torch.Tensor
    own: torch.Tensor
    late: torch.Tensor
    confidences: torch.Tensor
    rows: int
    stride: int
    wanted: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class DraftStage:
    """The arms of a worker as its round sees them. slot_table: [request rows, ctx] int32. text: `TokenTable.data`."""

    drafters: Mapping[str, Drafter]
    sync: DraftSync
    costs: MeasuredCosts
    clock: RoundClock
    slot_table: torch.Tensor
    text: torch.Tensor
    host: HostView

    def capture(self, recorder: Recorder | None, requests: int) -> None:
        """Have the passes of all arms captured, for batches of up to so many requests; None: they run as written.

        Raises ConfigError where one cannot be captured.
        """
        if recorder is None:
            return
        inputs = PassInput.of_padding(requests, self.sync.rings.rings.features, self.slot_table)
        for drafter in self.drafters.values():
            drafter.capture(recorder, inputs)
        self.sync.capture(recorder, requests, requests * (widest_of(self.drafters) + 1))

    def draft(self, requests: RoundBatch, plan: Plan) -> Proposal:
        """Each arm drafts for its own requests; the results are laid side by side."""
        size, device, widest = len(plan.routes), requests.rows.device, max(plan.rooms)
        if not widest:
            ones, nothing = torch.ones_like(requests.rows), torch.empty((size, 0), device=device)
            return Proposal(nothing.long(), ones, ones - 1, ones - 1, nothing, size, 1)
        drafts = Drafts(
            tokens=torch.zeros((size, widest), dtype=torch.int64, device=device),
            counts=torch.zeros(size, dtype=torch.int64, device=device),
            alive=torch.ones((size, widest), device=device),
            confidences=torch.zeros((size, max(plan.limits)), device=device),
        )
        for arm, members in plan.members.items():
            began = time.perf_counter()
            own = self.drafters[arm].draft(self._batch(requests, plan, arm))
            seconds, catch_up = time.perf_counter() - began, self.sync.seconds.get(arm, 0.0)
            self.costs.drafted(arm, len(members), passes=own.passes, seconds=seconds, catch_up=catch_up)
            lay(own, plan.on_device.members[arm], drafts)
            self.clock.drafted(time.perf_counter() - began + catch_up)
        began, own_counts = time.perf_counter(), drafts.counts
        if any(plan.joined):
            drafts, own_counts = self._prolonged(requests, plan, drafts)
        late = torch.zeros_like(own_counts)
        if plan.late is not None:
            drafts, late = self._with_late(requests, plan, plan.late, drafts)
        self.clock.drafted(time.perf_counter() - began)
        return self._proposal(plan, drafts, own_counts, late)

    def _proposal(self, plan: Plan, drafts: Drafts, own: torch.Tensor, late: torch.Tensor) -> Proposal:
        """What is verified: all drafts, or where the host may not count them as many as fit, the likeliest first."""
        assert drafts.confidences is not None
        size, widest, most = len(plan.routes), max(plan.rooms), sum(plan.rooms)
        counts, wanted = drafts.counts, None
        if not self.host.exact:
            most = bucket_of(size + min(plan.usual_drafts, most)) - size
            counts, wanted = likeliest(drafts, most), counts
        widths = counts + 1
        stride = self.host.size(widths.max(), widest + 1)
        rows = self.host.size(widths.sum(), size + most)
        tokens = drafts.tokens[:, : stride - 1]
        own = torch.minimum(own, counts)
        return Proposal(tokens, widths, own, late, drafts.confidences, rows, stride, wanted)

    def _prolonged(self, requests: RoundBatch, plan: Plan, drafts: Drafts) -> tuple[Drafts, torch.Tensor]:
        """The drafts, and behind them what other arms know to follow, such as the copy that a chain leads into; and
        [B] int64, drafts of each request's own arm that are left.

        Whoever may prolong is asked twice, since each may lead into what another one knows; in the second turn also of
        its own drafts, which others have prolonged by then.
        """
        own, newest = drafts.counts, None
        prolonging = [(arm, drafter) for arm, drafter in self.drafters.items() if drafter.prolongs]
        for again, (arm, drafter) in product((False, True), prolonging):
            if newest == arm or (again and (newest is None or drafter.late)):
                continue  # nothing is behind the drafts that it has not seen
            rooms = [
                0 if route == arm and not again else room
                for route, room in zip(plan.routes, plan.joined, strict=True)
            ]
            if not any(rooms):
                continue
            batch = self._whole_batch(requests, plan, arm)
            more = drafter.prolong(Grown(batch, drafts, rooms, plan.on_device.joined))
            if more is not None:
                drafts, newest = behind(drafts, more), arm
                own = own if more.after is None else torch.minimum(own, more.after)
        return drafts, own

    def _with_late(
        self, requests: RoundBatch, plan: Plan, arm: str, drafts: Drafts
    ) -> tuple[Drafts, torch.Tensor]:
        """The drafts, or a request's drafts of `arm` where these bring more; and [B] int64, 1 where they do."""
        found = self.drafters[arm].draft(self._whole_batch(requests, plan, arm))
        assert drafts.alive is not None
        assert found.alive is not None
        width = drafts.tokens.shape[1]
        column = torch.arange(found.tokens.shape[1], device=found.counts.device)
        gain = torch.where(column < found.counts[:, None], found.alive - plan.worth[arm].row, 0.0).sum(1)
        taken = (found.counts > 0) & (gain > plan.on_device.must_beat)
        tokens, alive = (
            F.pad(t, (0, max(width - t.shape[1], 0)))[:, :width] for t in (found.tokens, found.alive)
        )
        merged = replace(
            drafts,
            tokens=torch.where(taken[:, None], tokens, drafts.tokens),
            alive=torch.where(taken[:, None], alive, drafts.alive),
            counts=torch.where(taken, found.counts, drafts.counts),
        )
        return merged, taken.long()

    def _batch(self, requests: RoundBatch, plan: Plan, arm: str) -> DraftBatch:
        """The requests that `arm` drafts for."""
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

    def _whole_batch(self, requests: RoundBatch, plan: Plan, arm: str) -> DraftBatch:
        """All requests, for an arm that goes by their text alone."""
        return DraftBatch(
            rows=requests.rows,
            row_ids=requests.row_ids,
            lengths=requests.lengths.most,
            starts=requests.starts,
            bonus=requests.bonus,
            tail=requests.bonus.new_empty((len(plan.routes), 0)),
            slot_table=self.slot_table,
            limits=plan.late_limits,
            caps=plan.on_device.late_limits,
            calibration=plan.on_device.calibration.get(arm, plan.on_device.must_beat[:0]),
            worth=plan.worth[arm],
            host=self.host,
            text=self.text,
        )

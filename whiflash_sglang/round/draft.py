"""The draft stage of a round: runs the drafters and chooses the drafts that are verified."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from whiflash_kernels import Drafts, SamplingTable, choose_drafts, lay_drafts
from whiflash_kernels.warm import Served, warm_up

from whiflash_sglang.arms.base import Drafter, widest_of, with_kv
from whiflash_sglang.arms.length import CALIBRATION, EDGES
from whiflash_sglang.cache.backlog import columns_of
from whiflash_sglang.copying.calibration import BUCKETS
from whiflash_sglang.device.capture import MOST_DRAFTS, Recorder
from whiflash_sglang.device.transfers import sent
from whiflash_sglang.records.core import DraftBatch, Plan, Round
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.sources import DraftSources


@dataclass(frozen=True, slots=True)
class DraftStage:
    """Drafts for a batch: runs each arm for its requests, and chooses among drafts, candidates and copies.

    slot_table: [request rows, ctx] int32. text: `TokenTable.data`. stops: `StopTable.few`. sampling:
    `SamplingRows.data`. rows_for: `Target.rows_for`. overlaps: whether a round is planned while the last one runs.
    """

    drafters: Mapping[str, Drafter]
    sync: DraftSync
    slot_table: torch.Tensor
    text: torch.Tensor
    stops: torch.Tensor
    sampling: SamplingTable
    sources: DraftSources
    quarantine: Quarantine
    rows_for: Callable[[int, int], int | None]
    overlaps: bool

    def capture(self, recorder: Recorder | None, requests: int) -> None:
        """Capture the passes of all arms for batches of up to `requests` requests; without a recorder they run eagerly.

        The kernels between the passes are compiled in both cases.

        Raises ConfigError if a pass cannot be captured.
        """
        kv = with_kv(self.drafters).values()
        copies = max((drafter.max_drafts for drafter in self.sources.on_device.values()), default=0)
        warm_up(
            Served(
                self.text,
                self.slot_table,
                self.stops,
                self.sync.rings.rings,
                self.sync.watermarks.device,
                self.sampling,
                requests,
                widths={max(drafter.max_drafts, 1) for drafter in self.drafters.values()},
                candidates=(len(self.sources.proposing), self.sources.width),
                vocabulary=self.sources.vocabulary,
                bins=len(EDGES) + 1,
                columns=[(*columns_of(drafter.features), drafter.tail_width > 0) for drafter in kv],
                copied=(copies, len(BUCKETS)) if copies else None,
            )
        )
        if recorder is None:
            return
        features = self.sync.rings.rings.features
        inputs = DraftBatch.of_padding(requests, features, self.slot_table, CALIBRATION)
        for drafter in kv:
            drafter.capture(recorder, inputs)
        self.sync.capture(recorder, requests, requests * (widest_of(self.drafters) + 1))

    def draft(self, round_: Round) -> None:
        """Have each arm draft for its requests, then choose the drafts that are verified."""
        if not any(round_.plan.limits.drafts):
            round_.draft_nothing()
            return
        parts = []
        for arm, members in round_.members.items():
            drafted_for, drafts = self._drafted(round_, arm, members)
            if drafts is not None:  # else the arm failed: its requests verify only their bonus tokens
                parts.append((_index(round_, arm, drafted_for), drafts))
        self._choose(round_, parts)

    def _drafted(self, round_: Round, arm: str, members: Sequence[int]) -> tuple[Sequence[int], Drafts | None]:
        """Return the members for which `arm` drafted without an error, and their drafts, None if there are none."""
        if arm in self.quarantine:
            return (), None

        def draft(some: Sequence[int]) -> Drafts:
            return self.drafters[arm].draft(self._batch(round_, arm, some))

        return self.quarantine.attempt(arm, {i: round_.requests[i] for i in members}, draft)

    def _choose(self, round_: Round, parts: Sequence[tuple[torch.Tensor, Drafts]]) -> None:
        """Choose the drafts that are verified among the passes' (`parts`), the host's candidates and the device's
        copies: the likeliest first, as many as there are rows for.
        """
        plan, limits, size = round_.plan, round_.plan.limits, len(round_)
        most, graph = self._room(plan, size)
        if not (self.overlaps or graph or round_.members or round_.host_drafts):
            # The host waits for the rows' number anyway. Mostly there is no copy, or it does not pay for its first row.
            copies = round_.copies = self._copies(round_)
            if copies is None or copies.alive is None or not (copies.alive[:, 0] > plan.worth.row).any():
                round_.draft_nothing()
                return
        # To copy what follows a request's drafts, the device needs them written after its text.
        behind = any(limits.joined)
        round_.drafts = lay_drafts(
            parts,
            round_.rows,
            round_.starts,
            width=max(limits.drafts),
            confidences=max(limits.passes),
            vocabulary=self.sources.vocabulary,
            text=self.text if behind else None,
        )
        appended = self._copies(round_, round_.drafts) if behind else None
        copies = round_.copies = round_.copies or (self._copies(round_) if any(limits.copied) else None)
        # Rows that a graph has to spare are filled; without a graph each row costs.
        fills = graph and all(self.drafters[arm].fills for arm in round_.members)
        from_host, at = round_.host_drafts or (None, None)
        round_.chosen = choose_drafts(
            round_.drafts,
            round_.rows,
            round_.starts,
            self.text,
            appended=appended,
            from_host=from_host,
            at=at,
            copies=copies,
            limits=round_.limits.drafts,
            worth=plan.worth.row,
            least=plan.worth.least_chance,
            most_drafts=most,
            stops=self.stops,
            drawn=round_.limits.passes if fills else round_.drafts.counts,
        )
        round_.packed_rows, round_.stride = size + most, 1 + max(limits.drafts) if most else 1

    def _room(self, plan: Plan, size: int) -> tuple[int, bool]:
        """Return the most drafts that a round of `size` requests verifies, and whether a graph verifies them.

        With a graph these are as many as fill the graph that `Plan.usual_drafts` needs. Otherwise they are all drafts
        that the limits allow, since the host then counts the rows.
        """
        most = min(sum(plan.limits.drafts), MOST_DRAFTS)
        usual = min(plan.usual_drafts, most)
        rows = self.rows_for(size + usual, size)
        if rows is None:
            return most, False
        # If no drafts are expected, a graph of one row per request is enough.
        return rows - size if usual else 0, True

    def _copies(self, round_: Round, drafts: Drafts | None = None) -> Drafts | None:
        """Return the drafts that the device copies after each request's text or `drafts`; None if no arm copies."""
        for arm, drafter in self.sources.on_device.items():
            if arm in round_.calibration and arm not in self.quarantine:  # the plan's, on which all ranks agree
                with self.quarantine.guard(arm):
                    return drafter.copy(self._whole_batch(round_, arm, drafts is not None), drafts)
        return None

    def _batch(self, round_: Round, arm: str, members: Sequence[int]) -> DraftBatch:
        """Return the inputs of a pass of `arm` for `members` of the batch."""
        drafter, caps = self.drafters[arm], round_.limits.passes
        rows, starts, bonus, caps, tail, calibration = self.sync.rings.inputs(
            _index(round_, arm, members) if len(members) < len(round_) else None,
            round_.rows,
            round_.starts,
            round_.bonus,
            caps,
            round_.calibration[arm],
            wanted=drafter.features,
            tail=drafter.tail_width > 0,
            into=drafter.place(len(members)),
        )
        return DraftBatch(
            rows,
            starts,
            bonus,
            tail,
            self.slot_table,
            longest=max(round_.most[i] for i in members),
            caps=caps,
            limits=[round_.plan.limits.passes[i] for i in members],
            row_ids=[round_.row_ids[i] for i in members],
            calibration=calibration,
            worth=round_.plan.worth,
        )

    def _whole_batch(self, round_: Round, arm: str, behind: bool) -> DraftBatch:
        """Return the inputs of an arm that copies for all requests. behind: whether it copies after drafts."""
        limits = round_.limits
        return DraftBatch(
            round_.rows,
            round_.starts,
            round_.bonus,
            round_.bonus.new_empty((len(round_), 0)),
            self.slot_table,
            longest=max(round_.most),
            caps=limits.joined if behind else limits.copied,
            calibration=round_.calibration[arm],
            worth=round_.plan.worth,
            text=self.text,
        )


def _index(round_: Round, arm: str, members: Sequence[int]) -> torch.Tensor:
    """Return the batch indices `members` of `arm` on the device, [M] int64."""
    every = round_.member_indices[arm]
    return every if len(members) == len(every) else sent(members, every.device)

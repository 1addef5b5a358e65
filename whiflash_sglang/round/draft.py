"""The draft stage of a round: runs the drafters and chooses the drafts that are verified."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from whiflash_kernels import Drafts, SamplingTable, choose_drafts, lay_drafts
from whiflash_kernels.warm import Served, warm_up

from whiflash_sglang.arms.base import Drafter, padded, widest_of, with_kv
from whiflash_sglang.arms.length import CALIBRATION, EDGES
from whiflash_sglang.cache.backlog import columns_of
from whiflash_sglang.copying.calibration import BUCKETS
from whiflash_sglang.device.capture import MOST_DRAFTS, Recorder
from whiflash_sglang.device.transfers import HostView, sent
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import NOTHING, Candidate
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.prices.round_clock import RoundClock
from whiflash_sglang.records.core import DraftBatch, Round
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.sources import DraftSources


@dataclass(frozen=True, slots=True)
class DraftStage:
    """Drafts for a batch: runs each arm for its requests, and chooses among drafts, candidates and copies.

    slot_table: [request rows, ctx] int32. text: `TokenTable.data`. stops: `StopTable.few`. sampling:
    `SamplingRows.data`. rows_for: (rows, requests) → rows of the smallest captured verification that holds them.
    """

    drafters: Mapping[str, Drafter]
    sync: DraftSync
    clock: RoundClock
    slot_table: torch.Tensor
    text: torch.Tensor
    stops: torch.Tensor
    sampling: SamplingTable
    host: HostView
    sources: DraftSources
    quarantine: Quarantine
    rows_for: Callable[[int, int], int]

    def capture(self, recorder: Recorder | None, requests: int) -> None:
        """Capture the passes of all arms for batches of up to so many requests; without a recorder they run eagerly.

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

    def draft(self, turn: Round) -> None:
        """Have each arm draft for its requests, then choose the drafts that are verified."""
        if not any(turn.plan.limits.drafts):
            turn.draft_nothing()
            return
        parts = []
        for arm, members in turn.members.items():
            began = self.clock.now()
            drafted_for, drafts = self._drafted(turn, arm, members)
            if drafts is None:
                continue  # the arm failed: its requests verify only their bonus tokens
            if drafts.passes:  # only passes of a model are priced by arm; the rest counts for the round
                seconds, catch_up = self.clock.now() - began, self.sync.seconds.get(arm, 0.0)
                self.clock.drafted(arm, len(drafted_for), drafts.passes, seconds, catch_up)
            parts.append((_index(turn, arm, drafted_for), drafts))
        began = self.clock.now()
        self._choose(turn, parts)
        self.clock.proposed(self.clock.now() - began)

    def _drafted(self, turn: Round, arm: str, members: Sequence[int]) -> tuple[Sequence[int], Drafts | None]:
        """Return the members for which `arm` drafted without an error, and their drafts, None if there are none."""
        if arm in self.quarantine:
            return (), None

        def draft(some: Sequence[int]) -> Drafts:
            return self.drafters[arm].draft(self._batch(turn, arm, some))

        return self.quarantine.attempt(arm, {i: turn.requests[i] for i in members}, draft)

    def _choose(self, turn: Round, parts: Sequence[tuple[torch.Tensor, Drafts]]) -> None:
        """Choose the drafts that are verified, from the passes (`parts`) and from the draft sources."""
        # To copy what follows a request's drafts, the device needs them written after its text.
        limits = turn.plan.limits
        behind = any(limits.joined) and not self.host.exact
        turn.drafts = lay_drafts(
            parts,
            turn.rows,
            turn.starts,
            width=max(limits.drafts),
            confidences=max(limits.passes),
            vocabulary=self.sources.vocabulary,
            text=self.text if behind else None,
        )
        if self.host.exact:
            self._choose_known(turn)
        else:
            self._choose_unread(turn, self._copies(turn, turn.drafts) if behind else None)

    def _choose_known(self, turn: Round) -> None:
        """Choose on the host, which reads all drafts: every request has its chain verified whole."""
        chains, left = self._chains(turn)
        turn.parts = [chain.parts for chain in chains]
        widths = [1 + len(chain.tokens) for chain in chains]
        turn.packed_rows, turn.stride = sum(widths), max(widths)
        turn.chosen = choose_drafts(
            padded(chains, self.text.device, turn.stride - 1),
            turn.rows,
            turn.starts,
            self.text,
            first_counts=sent(left, self.text.device),
        )

    def _choose_unread(self, turn: Round, appended: Drafts | None) -> None:
        """Choose on the device among drafts, the host's candidates and the device's copies: the likeliest first, as
        many as there are rows for. appended: copies that follow the drafts.
        """
        size, plan = len(turn), turn.plan
        copies = turn.copies = self._copies(turn) if any(plan.limits.copied) else None
        most = min(plan.usual_drafts, sum(plan.limits.drafts), MOST_DRAFTS)
        if most:  # fill the graph's rows; without expected drafts a graph of one row per request is enough
            most = self.rows_for(size + most, size) - size
        from_host, at = turn.host_drafts or (None, None)
        turn.chosen = choose_drafts(
            turn.drafts,
            turn.rows,
            turn.starts,
            self.text,
            appended=appended,
            from_host=from_host,
            at=at,
            copies=copies,
            limits=turn.limits.drafts,
            worth=plan.row_worth,
            least=Worth(plan.row_worth, 0.0).least_chance,
            most_drafts=most,
        )
        widest = 1 + max(plan.limits.drafts) if most else 1
        turn.packed_rows, turn.stride, turn.bounded = size + most, widest, True

    def _chains(self, turn: Round) -> tuple[list[Candidate], list[int]]:
        """Return each request's chain of drafts, and how many at its beginning come from its pass or candidate. A
        request without a pass takes the candidate with the largest gain; other sources append tokens that follow.
        """
        chains, left, plan = [], [], turn.plan
        for i, (drafted, route) in enumerate(zip(_rows(turn.drafts), plan.routes, strict=True)):
            candidates = {route: NOTHING.followed_by(*drafted, route)}
            if route == arms.NONE:
                candidates |= {
                    arm: each.first(plan.limits.drafts[i]) for arm, each in plan.candidates[i].items()
                }
            first, chain = max(candidates.items(), key=lambda one: one[1].gain(plan.row_worth))
            kept = len(chain.tokens)
            if room := plan.limits.joined[i]:
                chain, valid = self.sources.extended(turn, i, first, chain, room)
                kept = min(kept, valid)
            chains.append(chain)
            left.append(kept)
        return chains, left

    def _copies(self, turn: Round, drafts: Drafts | None = None) -> Drafts | None:
        """Return the device's copies of what follows every request's text, or its `drafts`; None if no arm copies."""
        for arm, drafter in self.sources.on_device.items():
            if arm not in self.quarantine:
                with self.quarantine.guard(arm):
                    return drafter.copy(self._whole_batch(turn, arm, drafts is not None), drafts)
        return None

    def _batch(self, turn: Round, arm: str, members: Sequence[int]) -> DraftBatch:
        """Return the inputs of a pass of `arm` for `members` of the batch."""
        drafter, caps = self.drafters[arm], turn.limits.passes
        rows, starts, bonus, caps, tail, calibration = self.sync.rings.inputs(
            _index(turn, arm, members) if len(members) < len(turn) else None,
            turn.rows,
            turn.starts,
            turn.bonus,
            caps,
            turn.calibration[arm],
            drafter.features,
            tail=drafter.tail_width > 0,
            into=drafter.place(len(members)),
        )
        return DraftBatch(
            rows,
            starts,
            bonus,
            tail,
            self.slot_table,
            longest=max(turn.most[i] for i in members),
            caps=caps,
            limits=[turn.plan.limits.passes[i] for i in members],
            row_ids=[turn.row_ids[i] for i in members],
            calibration=calibration,
            worth=turn.plan.worth[arm],
            host=self.host,
        )

    def _whole_batch(self, turn: Round, arm: str, behind: bool) -> DraftBatch:
        """Return the inputs of an arm that copies for all requests. behind: it copies after their drafts."""
        limits = turn.limits
        return DraftBatch(
            turn.rows,
            turn.starts,
            turn.bonus,
            turn.bonus.new_empty((len(turn), 0)),
            self.slot_table,
            longest=max(turn.most),
            caps=limits.joined if behind else limits.copied,
            calibration=turn.calibration[arm],
            worth=turn.plan.worth[arm],
            host=self.host,
            text=self.text,
        )


def _index(turn: Round, arm: str, members: Sequence[int]) -> torch.Tensor:
    """Return the batch indices `members` of `arm` on the device, [M] int64."""
    every = turn.member_indices[arm]
    return every if len(members) == len(every) else sent(members, every.device)


def _rows(drafts: Drafts) -> list[tuple[list[int], list[float]]]:
    """Return the tokens and their chances of every request, read from the device."""
    assert drafts.alive is not None
    rows = zip(drafts.tokens.tolist(), drafts.alive.tolist(), drafts.counts.tolist(), strict=True)
    return [(tokens[:count], alive[:count]) for tokens, alive, count in rows]

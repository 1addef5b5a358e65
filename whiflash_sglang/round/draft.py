"""The draft stage of a round: drafts of the whole batch side by side."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from whiflash_kernels import Drafted, Laid, choose_drafts, join_drafts, lay_drafts
from whiflash_kernels.warm import warm_up

from whiflash_sglang.core import DraftBatch, Drafts, Grown, PassInput, RoundBatch, Voice
from whiflash_sglang.device.capture import MOST_DRAFTS, Recorder
from whiflash_sglang.device.transfers import HostView, sent
from whiflash_sglang.drafters.base import Drafter, widest_of
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.plan import Plan
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.strands import Strand, chosen_strands, strand_of
from whiflash_sglang.routing.costs import WorkerCosts
from whiflash_sglang.telemetry.round_clock import RoundClock
from whiflash_sglang.telemetry.trace import Part, first_of

LEAST_CHANCE = 0.1
"""Of a strand's token that is verified, where costs are not priced."""

TURNS = 3
"""In which arms are asked to go on behind the drafts of a round."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafts of the whole batch.

    tokens: [B, W] int64, padded. widths: [B] int32, rows each request verifies (drafts + 1). own: [B] int32, drafts of
    the request's own arm among them; confidences: [B, C] float32, what that arm gave them. late: [B] int32, 1 where the
    drafts are those of `Plan.late` instead. faults: [B] int32, 1 where what the request's own arm gave was no draft.
    rows: of the verification; stride: of its widest request, W + 1. Both are what the widths come to where the host may
    know them, else bounds. wanted: [B] int32, drafts that there were before the bound was kept to, where there is one.
    parts: of each request what its drafts were taken from, where somebody traces and the host knows. strands: further
    chains of requests; `rows` and `stride` count them.
    """

    tokens: torch.Tensor
    widths: torch.Tensor
    own: torch.Tensor
    late: torch.Tensor
    confidences: torch.Tensor
    faults: torch.Tensor
    rows: int
    stride: int
    wanted: torch.Tensor | None = None
    parts: Sequence[Sequence[Part]] | None = None
    strands: Sequence[Strand] = ()

    @property
    def rows_each(self) -> torch.Tensor:
        """[B] int32, rows that each request verifies, its strands' among them."""
        if not self.strands:
            return self.widths
        rows = self.widths.clone()
        for strand in self.strands:
            rows[strand.owner] += len(strand.tokens)
        return rows


@dataclass(frozen=True, slots=True)
class DraftStage:
    """The arms of a worker as its round sees them.

    slot_table: [request rows, ctx] int32. text: `TokenTable.data`. stops: `StopTable.few`.
    vocabulary: ids that the target has. rows_for: rows
    of the verification that holds so many, of so many requests. branches: chains of a request that one round verifies
    at most.
    """

    drafters: Mapping[str, Drafter]
    sync: DraftSync
    costs: WorkerCosts
    clock: RoundClock
    slot_table: torch.Tensor
    text: torch.Tensor
    stops: torch.Tensor
    host: HostView
    vocabulary: int
    quarantine: Quarantine
    rows_for: Callable[[int, int], int]
    branches: int = 1

    def capture(self, recorder: Recorder | None, requests: int) -> None:
        """Have the passes of all arms captured, for batches of up to so many requests; None: they run as written.

        What runs between them is compiled.

        Raises ConfigError where one cannot be captured.
        """
        widths = {max(drafter.max_drafts, 1) for drafter in self.drafters.values()}
        warm_up(self.text, self.slot_table, self.stops, requests, widths, self.vocabulary)
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
            ones = torch.ones_like(requests.rows, dtype=torch.int32)
            nothing = torch.empty((size, 0), device=device)
            return Proposal(nothing.long(), ones, ones - 1, ones - 1, nothing, ones - 1, size, 1)
        parts = []
        taken = _Taken(self.drafters, requests.row_ids) if self._traces(plan) else None
        for arm, members in plan.members.items():
            began = time.perf_counter()
            drafted_for, own = self._drafted(requests, plan, arm, members)
            if own is None:
                continue  # its requests verify their bonus tokens
            if own.passes:  # what only looks did so before; what is left is the round's, whoever drafts
                seconds, catch_up = time.perf_counter() - began, self.sync.seconds.get(arm, 0.0)
                self.costs.drafted(
                    arm, len(drafted_for), passes=own.passes, seconds=seconds, catch_up=catch_up
                )
                self.clock.drafted(seconds + catch_up)
            index = plan.on_device.members[arm]
            if len(drafted_for) < len(members):
                index = sent(drafted_for, device)
            parts.append(Drafted(index, own.tokens, own.counts, own.alive, own.confidences))
            if taken is not None:
                taken.first(arm, drafted_for, own)
        began = time.perf_counter()
        proposal = self._proposal(requests, plan, parts, taken)
        self.clock.drafted(time.perf_counter() - began)
        return proposal

    def _drafted(
        self, requests: RoundBatch, plan: Plan, arm: str, members: Sequence[int]
    ) -> tuple[Sequence[int], Drafts | None]:
        """What `arm` drafts for `members` of the batch, and for which of them."""
        if arm in self.quarantine:
            return (), None
        drafter, all_of_them = self.drafters[arm], plan.on_device.members[arm]

        def draft(chosen: Sequence[int]) -> Drafts:
            own = [members[i] for i in chosen]
            index = all_of_them if len(own) == len(members) else sent(own, all_of_them.device)
            return drafter.draft(self._batch(requests, plan, arm, own, index))

        rids = [requests.reqs[i].rid for i in members]
        chosen, drafts = self.quarantine.attempt(arm, rids, draft)
        return [members[i] for i in chosen], drafts

    def _traces(self, plan: Plan) -> bool:
        """Whether somebody wants to know what drafts are taken from, and may."""
        return self.host.exact and any(state.recording is not None for state in plan.states)

    def _proposal(
        self, requests: RoundBatch, plan: Plan, parts: Sequence[Drafted], taken: "_Taken | None"
    ) -> Proposal:
        """What is verified: all drafts, or where the host may not count them as many as fit, the likeliest first."""
        size, widest, most = len(plan.routes), max(plan.rooms), sum(plan.rooms)
        # The device looks up what follows drafts behind the text.
        text = self.text if any(plan.joined) and not self.host.exact else None
        laid = lay_drafts(
            parts,
            requests.rows,
            requests.starts,
            width=widest,
            confidences=max(plan.limits),
            vocabulary=self.vocabulary,
            text=text,
        )
        own, behind = laid.counts, None
        if any(plan.joined):
            laid, behind, own = self._prolonged(requests, plan, laid, text, taken)
        late, worth = None, 0.0
        if plan.late is not None:
            batch, worth = self._whole_batch(requests, plan, plan.late), plan.worth[plan.late].row
            with self.quarantine.guard(plan.late):
                found = self.drafters[plan.late].draft(batch)
                late = Drafted(requests.rows, found.tokens, found.counts, found.alive, None)
        if not self.host.exact:
            most = self.rows_for(size + min(plan.usual_drafts, most, MOST_DRAFTS), size) - size
        chosen = choose_drafts(
            laid,
            requests.rows,
            requests.starts,
            self.text,
            own=own,
            behind=behind,
            late=late,
            must_beat=None if late is None else plan.on_device.must_beat,
            worth=worth,
            room=None if self.host.exact else most,
        )
        stride, rows = widest + 1, size + most
        strands: Sequence[Strand] = ()
        if self.host.exact:
            widths = chosen.widths.tolist()
            strands = self._strands(requests, plan, laid, behind, widths)
            stride = max([*widths, *(strand.fork + 1 + len(strand.tokens) for strand in strands)])
            rows = sum(widths) + sum(len(strand.tokens) for strand in strands)
        tokens = chosen.tokens[:, : stride - 1]
        wanted = None if self.host.exact else chosen.wanted
        return Proposal(
            tokens,
            chosen.widths,
            chosen.own,
            chosen.late,
            laid.confidences,
            laid.faults,
            rows,
            stride,
            wanted,
            None if taken is None else taken.parts,
            strands,
        )

    def _strands(
        self, requests: RoundBatch, plan: Plan, laid: Laid, behind: Drafted | None, widths: Sequence[int]
    ) -> list[Strand]:
        """What free voices say beside the first chains: copies and forced text from the end of the text."""
        widest = widest_of(self.drafters) + 1
        rooms = [min(widest, budget) for budget in requests.budgets]
        voices = [drafter for drafter in self.drafters.values() if drafter.prolongs]
        open_to = [
            i
            for i, (route, joined, width) in enumerate(zip(plan.routes, plan.joined, widths, strict=True))
            if requests.spare and joined and 1 < width < rooms[i] and not requests.chain_only[i]
        ]
        if not open_to or not voices:
            return []
        found, chains = [], _chains(laid, behind)
        for i in open_to:
            row, rid = requests.names[i]
            for drafter in voices:
                if drafter.arm == plan.routes[i] or not self.quarantine.serves(drafter.arm, rid):
                    continue
                with self.quarantine.guard(drafter.arm, rid):
                    worth = plan.worth[drafter.arm]
                    voice = drafter.voice(row, requests.lengths.most[i], rooms[i] - 1, worth)
                    strand = voice and strand_of(
                        i, chains[i], voice, rooms[i] - widths[i], worth.row or LEAST_CHANCE
                    )
                    if strand:
                        found.append(strand)
        return chosen_strands(found, widths, rooms, self.branches - 1, len(requests.spare))

    def _prolonged(
        self,
        requests: RoundBatch,
        plan: Plan,
        laid: Laid,
        text: torch.Tensor | None,
        taken: "_Taken | None",
    ) -> tuple[Laid, Drafted | None, torch.Tensor]:
        """The drafts with what other arms know to follow, such as the copy that a chain leads into; what is to go
        behind them yet; and [B] int64, drafts of each request's own arm that are left.

        Whoever may prolong is asked twice, since each may lead into what another one knows; in the second turn also of
        its own drafts, which others have prolonged by then. Who forbids drafts is asked once more, of what came last.
        """
        own, more = laid.counts, None
        grown, seen = 0, dict[str, int]()
        prolonging = [(arm, drafter) for arm, drafter in self.drafters.items() if drafter.prolongs]
        for turn, (arm, drafter) in product(range(TURNS), prolonging):
            again = turn > 0
            if arm in self.quarantine or (turn == TURNS - 1 and not drafter.forbids):
                continue
            if seen.get(arm) == grown or (again and (not grown or drafter.late)):
                continue  # nothing is behind the drafts that it has not seen
            rooms = [
                0 if (route == arm and not again) or not self.quarantine.serves(arm, req.rid) else room
                for route, room, req in zip(plan.routes, plan.joined, requests.reqs, strict=True)
            ]
            if not any(rooms):
                continue
            laid, more = _joined(requests, laid, more, text), None
            batch = self._whole_batch(requests, plan, arm)
            drafts = Drafts(laid.tokens, laid.counts, laid.alive)
            more = self._behind(arm, Grown(batch, drafts, rooms, plan.on_device.joined), requests)
            if more is not None:
                grown += not drafter.forbids or bool(more.counts.any())
                if taken is not None:
                    taken.behind(arm, more)
                own = own if more.after is None else torch.minimum(own, more.after)
            seen[arm] = grown
        if more is None or more.after is not None:
            return _joined(requests, laid, more, text), None, own
        return laid, Drafted(requests.rows, more.tokens, more.counts, more.alive, None), own

    def _behind(self, arm: str, grown: Grown, requests: RoundBatch) -> Drafts | None:
        """What `arm` has to follow the drafts of those requests that have room for it."""
        asked = [i for i, room in enumerate(grown.rooms) if room]

        def prolong(chosen: Sequence[int]) -> Drafts | None:
            own = {asked[i] for i in chosen}
            rooms = [room if i in own else 0 for i, room in enumerate(grown.rooms)]
            return self.drafters[arm].prolong(replace(grown, rooms=rooms))

        rids = [requests.reqs[i].rid for i in asked]
        return self.quarantine.attempt(arm, rids, prolong)[1]

    def _batch(
        self, requests: RoundBatch, plan: Plan, arm: str, members: Sequence[int], index: torch.Tensor
    ) -> DraftBatch:
        """The requests that `arm` drafts for: `members` of the batch, and the same on the device."""
        inputs = self.sync.inputs(
            arm,
            index if len(members) < len(plan.routes) else None,
            requests.rows,
            requests.starts,
            requests.bonus,
            plan.on_device.limits,
        )
        return DraftBatch(
            rows=inputs.request_slots,
            row_ids=[requests.row_ids[i] for i in members],
            lengths=[requests.lengths.most[i] for i in members],
            starts=inputs.seq_lens,
            bonus=inputs.bonus,
            tail=inputs.tail,
            slot_table=self.slot_table,
            limits=[plan.limits[i] for i in members],
            caps=inputs.limits,
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


def _chains(laid: Laid, behind: Drafted | None) -> list[Voice]:
    """The first chain of every request, read from the device."""
    tokens, alive, counts = laid.tokens.tolist(), laid.alive.tolist(), laid.counts.tolist()
    chains = [Voice(own[:n], sure[:n], "") for own, sure, n in zip(tokens, alive, counts, strict=True)]
    if behind is None or behind.alive is None:
        return chains
    more = zip(behind.tokens.tolist(), behind.alive.tolist(), behind.counts.tolist(), strict=True)
    return [
        Voice([*chain.tokens, *own[:n]], [*chain.alive, *sure[:n]], "")
        for chain, (own, sure, n) in zip(chains, more, strict=True)
    ]


class _Taken:
    """What the drafts of each request are taken from. row_ids: of the requests."""

    def __init__(self, drafters: Mapping[str, Drafter], row_ids: Sequence[int]) -> None:
        self._drafters, self._row_ids = drafters, row_ids
        self.parts: list[list[Part]] = [[] for _ in row_ids]

    def first(self, arm: str, members: Sequence[int], drafts: Drafts) -> None:
        """The requests that `arm` drafts for have these, in the order of `members`."""
        for index, count in zip(members, drafts.counts.tolist(), strict=True):
            self._add(arm, index, count)

    def behind(self, arm: str, more: Drafts) -> None:
        """`arm` has put these behind the drafts of each request, or behind the first `after` of them."""
        after = None if more.after is None else more.after.tolist()
        for index, count in enumerate(more.counts.tolist()):
            if after is not None:
                self.parts[index] = list(first_of(self.parts[index], after[index]))
            self._add(arm, index, count)

    def _add(self, arm: str, index: int, count: int) -> None:
        if count:
            self.parts[index].append(Part(self._drafters[arm].source(self._row_ids[index]), count))


def _joined(requests: RoundBatch, laid: Laid, more: Drafts | None, text: torch.Tensor | None) -> Laid:
    if more is None:
        return laid
    behind = Drafted(requests.rows, more.tokens, more.counts, more.alive, None)
    return join_drafts(laid, behind, requests.rows, requests.starts, after=more.after, text=text)

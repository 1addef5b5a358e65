"""The draft stage of a round: drafts of the whole batch side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from whiflash_kernels import Copies, Drafts, choose_drafts, lay_drafts
from whiflash_kernels.warm import Served, warm_up

from whiflash_sglang import arms
from whiflash_sglang.cache.backlog import columns_of
from whiflash_sglang.core import SILENCE, DraftBatch, PassInput, Proposal, RoundBatch, Strand, Voice
from whiflash_sglang.device.capture import MOST_DRAFTS, Recorder
from whiflash_sglang.device.transfers import HostView, sent
from whiflash_sglang.drafters.base import Drafter, padded, widest_of, with_kv
from whiflash_sglang.drafters.length import EDGES
from whiflash_sglang.lookup.calibration import BUCKETS
from whiflash_sglang.lookup.copier import CONTEXT
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.plan import Plan
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.strands import chosen_strands, strand_of
from whiflash_sglang.round.voices import Voices
from whiflash_sglang.telemetry.round_clock import DraftTime, RoundClock

LEAST_CHANCE = 0.1
"""Of a strand's token that is verified, where costs are not priced."""


@dataclass(frozen=True, slots=True)
class DraftStage:
    """The arms of a worker as its round sees them.

    slot_table: [request rows, ctx] int32. text: `TokenTable.data`. stops: `StopTable.few`. rows_for: rows of the
    verification that holds so many, of so many requests. branches: chains of a request that one round verifies at
    most.
    """

    drafters: Mapping[str, Drafter]
    sync: DraftSync
    clock: RoundClock
    slot_table: torch.Tensor
    text: torch.Tensor
    stops: torch.Tensor
    host: HostView
    voices: Voices
    quarantine: Quarantine
    rows_for: Callable[[int, int], int]
    branches: int = 1

    def capture(self, recorder: Recorder | None, requests: int) -> None:
        """Have the passes of all arms captured, for batches of up to so many requests; None: they run as written.

        What runs between them is compiled.

        Raises ConfigError where one cannot be captured.
        """
        kv = with_kv(self.drafters).values()
        copies = max((drafter.max_drafts for drafter in self.voices.on_device.values()), default=0)
        warm_up(
            Served(
                self.text,
                self.slot_table,
                self.stops,
                self.sync.rings.rings,
                self.sync.watermarks.device,
                requests,
                widths={max(drafter.max_drafts, 1) for drafter in self.drafters.values()},
                voices=(len(self.voices.speaking), self.voices.width),
                vocabulary=self.voices.vocabulary,
                bins=len(EDGES) + 1,
                columns=[(*columns_of(drafter.features), drafter.tail_width > 0) for drafter in kv],
                copied=(copies, len(BUCKETS)) if copies else None,
            )
        )
        if recorder is None:
            return
        inputs = PassInput.of_padding(requests, self.sync.rings.rings.features, self.slot_table)
        for drafter in kv:
            drafter.capture(recorder, inputs)
        self.sync.capture(recorder, requests, requests * (widest_of(self.drafters) + 1))

    def draft(self, requests: RoundBatch, plan: Plan) -> Proposal:
        """Each arm drafts for its own requests; the results are laid side by side."""
        if not any(plan.rooms):
            return Proposal.of_nothing(requests.rows)
        parts = []
        for arm, members in plan.members.items():
            began = self.clock.now()
            drafted_for, own = self._drafted(requests, plan, arm, members)
            if own is None:
                continue  # its requests verify their bonus tokens
            if own.passes:  # what is left is the round's, whoever drafts
                seconds, catch_up = self.clock.now() - began, self.sync.seconds.get(arm, 0.0)
                self.clock.drafted(DraftTime(arm, len(drafted_for), own.passes, seconds, catch_up))
            index = plan.on_device.members[arm]
            if len(drafted_for) < len(members):
                index = sent(drafted_for, requests.rows.device)
            parts.append((index, own))
        began = self.clock.now()
        proposal = self._proposal(requests, plan, parts)
        self.clock.proposed(self.clock.now() - began)
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

    def _proposal(
        self, requests: RoundBatch, plan: Plan, parts: Sequence[tuple[torch.Tensor, Drafts]]
    ) -> Proposal:
        """What is verified: all drafts, or where the host may not count them as many as fit, the likeliest first."""
        size, widest, most = len(plan.routes), max(plan.rooms), sum(plan.rooms)
        # The device looks up what follows drafts behind the text.
        text = self.text if any(plan.joined) and not self.host.exact else None
        drafts = lay_drafts(
            parts,
            requests.rows,
            requests.starts,
            width=widest,
            confidences=max(plan.limits),
            vocabulary=self.voices.vocabulary,
            text=text,
        )
        extended, own = drafts, drafts.counts
        appended = None if text is None else _drafts(self._copies(requests, plan, drafts))
        copies = self._copies(requests, plan) if any(plan.copying) else None
        chains: list[Voice] = []
        if self.host.exact or any(self._extends(requests, plan, i) for i in range(size)):
            chains, left, others = self._chains(requests, plan, drafts, appended)
            own = sent(left, drafts.counts.device)
            extended, appended = padded(chains, self.text.device, widest), None
        if not self.host.exact:
            most = self.rows_for(size + min(plan.usual_drafts, most, MOST_DRAFTS), size) - size
        chosen = choose_drafts(
            extended,
            requests.rows,
            requests.starts,
            self.text,
            own=own,
            appended=appended,
            from_host=plan.on_device.from_host,
            copies=_drafts(copies),
            rooms=plan.on_device.rooms,
            worth=plan.row_worth,
            room=None if self.host.exact else most,
        )
        if not self.host.exact:
            laid = [chain.parts for chain in chains] or None
            rows = size + most
            return Proposal(chosen, drafts, rows, stride=widest + 1, bounded=True, parts=laid, copies=copies)
        strands = self._strands(requests, plan, chains, others)
        widths = [1 + len(chain.tokens) for chain in chains]
        stride = max([*widths, *(strand.fork + 1 + len(strand.tokens) for strand in strands)])
        return Proposal(
            chosen._replace(tokens=chosen.tokens[:, : stride - 1]),
            drafts,
            rows=sum(widths) + sum(len(strand.tokens) for strand in strands),
            stride=stride,
            parts=[chain.parts for chain in chains],
            strands=strands,
        )

    def _extends(self, requests: RoundBatch, plan: Plan, index: int) -> bool:
        """Whether drafts of a request are extended on the host."""
        row = requests.row_ids[index]
        reads = self.host.exact or any(drafter.reads(row) for drafter in self.voices.speaking.values())
        return reads and plan.joined[index] > 0

    def _chains(
        self, requests: RoundBatch, plan: Plan, drafts: Drafts, appended: Drafts | None
    ) -> tuple[list[Voice], list[int], list[list[Voice]]]:
        """What is verified of each request: its pass's drafts, or without one the likeliest voice, with what others
        know to follow. How many of these drafts are left then; and the other voices.
        """
        chains, left, others = [], [], []
        copied = [([], [])] * len(plan.routes) if appended is None else _rows(appended)
        for i, (own, route) in enumerate(zip(_rows(drafts), plan.routes, strict=True)):
            said = {route: SILENCE.followed_by(*own, route)}
            if self.host.exact:
                said |= {arm: voice.first(plan.rooms[i]) for arm, voice in plan.voices[i].items()}
            if route == arms.NONE:
                said = dict(sorted(said.items(), key=lambda one: -one[1].gain(plan.row_worth)))
            (first, chain), *rest = said.items()
            kept = len(chain.tokens)
            chain = chain.followed_by(*copied[i], CONTEXT)
            if self._extends(requests, plan, i):
                name, room = requests.names[i], plan.joined[i]
                chain, sound = self.voices.extended(name, first, chain, room, plan.worth)
                kept = min(kept, sound)
            chains.append(chain)
            left.append(kept)
            others.append([voice for _, voice in rest])
        return chains, left, others

    def _strands(
        self, requests: RoundBatch, plan: Plan, chains: Sequence[Voice], others: Sequence[Sequence[Voice]]
    ) -> list[Strand]:
        """What the other voices say beside the first chains, from the end of the text."""
        widest = widest_of(self.drafters) + 1
        rooms = [min(widest, budget) for budget in requests.budgets]
        widths, found = [1 + len(chain.tokens) for chain in chains], []
        for i, chain in enumerate(chains):
            room = rooms[i] - widths[i]
            if (
                not (requests.spare and plan.joined[i] and chain.tokens and room > 0)
                or requests.chain_only[i]
            ):
                continue
            least = plan.row_worth or LEAST_CHANCE
            strands = (strand_of(i, chain, voice, room, least) for voice in others[i])
            found += [strand for strand in strands if strand is not None]
        return chosen_strands(found, widths, rooms, self.branches - 1, len(requests.spare))

    def _copies(self, requests: RoundBatch, plan: Plan, drafts: Drafts | None = None) -> Copies | None:
        """Copies that the device drafts for all requests: after their text, or after the `drafts` that follow it."""
        for arm, drafter in self.voices.on_device.items():
            if arm not in self.quarantine:
                with self.quarantine.guard(arm):
                    return drafter.copy(self._whole_batch(requests, plan, arm, drafts is not None), drafts)
        return None

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

    def _whole_batch(self, requests: RoundBatch, plan: Plan, arm: str, behind: bool) -> DraftBatch:
        """All requests, for an arm that drafts from their text only, or after their drafts (`behind`)."""
        return DraftBatch(
            rows=requests.rows,
            row_ids=requests.row_ids,
            lengths=requests.lengths.most,
            starts=requests.starts,
            bonus=requests.bonus,
            tail=requests.bonus.new_empty((len(plan.routes), 0)),
            slot_table=self.slot_table,
            limits=plan.joined if behind else plan.copying,
            caps=plan.on_device.joined if behind else plan.on_device.copying,
            calibration=plan.on_device.calibration[arm],
            worth=plan.worth[arm],
            host=self.host,
            text=self.text,
        )


def _drafts(copies: Copies | None) -> Drafts | None:
    return None if copies is None else Drafts(copies.tokens, copies.widths, copies.alive, passes=0)


def _rows(drafts: Drafts) -> list[tuple[list[int], list[float]]]:
    """Tokens and chances of every request, read from the device."""
    assert drafts.alive is not None
    rows = zip(drafts.tokens.tolist(), drafts.alive.tolist(), drafts.counts.tolist(), strict=True)
    return [(tokens[:count], alive[:count]) for tokens, alive, count in rows]

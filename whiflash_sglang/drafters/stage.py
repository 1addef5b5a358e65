"""The draft stage of a round: what the arms expect before it, and drafts of the whole batch side by side."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from whiflash_sglang.cache.sync import DraftSync
from whiflash_sglang.compat.spec_worker import RoundBatch
from whiflash_sglang.drafters.base import DraftBatch, Drafter, Drafts
from whiflash_sglang.metrics import RoundClock
from whiflash_sglang.routing.controller import Controller, Outlook


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafts of the whole batch. tokens: [B, W] int64, padded; widths: rows each request verifies (drafts + 1)."""

    tokens: torch.Tensor
    widths: list[int]


@dataclass(frozen=True, slots=True)
class DraftStage:
    """The arms of a worker as its round sees them. slot_table: [request rows, ctx] int32."""

    drafters: Mapping[str, Drafter]
    sync: DraftSync
    controller: Controller
    clock: RoundClock
    slot_table: torch.Tensor

    def outlook(self, requests: RoundBatch, index: int) -> Outlook:
        """Arms that may draft for a request, with the acceptance length of those that know it beforehand."""
        if requests.budgets[index] <= 1:
            return {}  # The last token a request may commit needs no draft: it is the bonus token.
        row, n = requests.row_ids[index], requests.lengths[index]
        history = partial(requests.history, index)
        found = {arm: drafter.outlook(row, n, history) for arm, drafter in self.drafters.items()}
        return {arm: expected for arm, expected in found.items() if expected is None or expected > 1}

    def draft(self, requests: RoundBatch, routes: Sequence[str]) -> Proposal:
        """Each arm drafts for its own requests; the results are laid side by side."""
        widest = max((drafter.max_drafts for drafter in self.drafters.values()), default=0)
        tokens = torch.zeros((len(routes), widest), dtype=torch.int64, device=requests.bonus.device)
        widths = [1] * len(routes)
        for arm, drafter in self.drafters.items():
            members = [i for i, route in enumerate(routes) if route == arm]
            if not members:
                continue
            began = time.perf_counter()
            drafts = drafter.draft(self._batch(requests, members, drafter))
            seconds, catch_up = time.perf_counter() - began, self.sync.seconds.get(arm, 0.0)
            self.controller.costs.drafted(
                arm, len(members), passes=drafts.passes, seconds=seconds, catch_up=catch_up
            )
            self.clock.drafted(seconds + catch_up)
            index = torch.tensor(members, device=tokens.device)
            tokens[index, : drafts.tokens.shape[1]] = drafts.tokens
            for i, count in zip(members, drafts.counts, strict=True):
                widths[i] = count + 1
            self._prolong(requests, members, arm, drafts, Proposal(tokens, widths))
        return Proposal(tokens[:, : max(widths) - 1], widths)

    def _prolong(
        self, requests: RoundBatch, members: list[int], arm: str, drafts: Drafts, into: Proposal
    ) -> None:
        """Append to an arm's drafts what another arm knows to follow them: a chain may lead into a copy."""
        others = [other for other in self.drafters.values() if other.arm != arm and not other.keeps_kv]
        open_to_it = [i for i in members if self.controller.may_join(requests.row_ids[i])]
        if not (others and open_to_it and drafts.alive):
            return
        tokens, widest = drafts.tokens.tolist(), into.tokens.shape[1]
        for i, own, count, alive in zip(members, tokens, drafts.counts, drafts.alive, strict=True):
            room = min(widest, requests.budgets[i] - 1) - count
            if room < 1 or i not in open_to_it:
                continue
            worth = self.controller.worth(arm)
            found = (o.prolong(requests.row_ids[i], own[:count], alive, room, worth) for o in others)
            more = max(found, key=len)
            if more:
                into.tokens[i, count : count + len(more)] = torch.tensor(more, device=into.tokens.device)
                into.widths[i] += len(more)

    def _batch(self, requests: RoundBatch, members: list[int], drafter: Drafter) -> DraftBatch:
        index = torch.tensor(members, device=requests.rows.device)
        rows, starts = requests.rows[index], requests.starts[index]
        return DraftBatch(
            rows=rows,
            row_ids=[requests.row_ids[i] for i in members],
            lengths=[requests.lengths[i] for i in members],
            starts=starts,
            bonus=requests.bonus[index],
            tail=self.sync.rings.tail(rows, starts),
            slot_table=self.slot_table,
            limits=[min(drafter.max_drafts, requests.budgets[i] - 1) for i in members],
            worth=self.controller.worth(drafter.arm),
        )

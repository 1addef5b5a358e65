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
    """Drafts of the whole batch.

    tokens: [B, W] int64, padded; widths: rows each request verifies (drafts + 1). confidences: what the drafters gave
    their own drafts, per request; empty where they give none.
    """

    tokens: torch.Tensor
    widths: list[int]
    confidences: list[list[float]]


@dataclass(frozen=True, slots=True)
class DraftStage:
    """The arms of a worker as its round sees them. slot_table: [request rows, ctx] int32."""

    drafters: Mapping[str, Drafter]
    sync: DraftSync
    controller: Controller
    clock: RoundClock
    slot_table: torch.Tensor

    @property
    def widest(self) -> int:
        """Most drafts of a round, whoever drafts them."""
        return max((drafter.max_drafts for drafter in self.drafters.values()), default=0)

    def outlook(self, requests: RoundBatch, index: int) -> Outlook:
        """Arms that may draft for a request, with the acceptance length of those that know it beforehand."""
        if requests.budgets[index] <= 1:
            return {}  # The last token a request may commit needs no draft: it is the bonus token.
        row, n = requests.row_ids[index], requests.lengths[index]
        history = partial(requests.history, index)
        found = {
            arm: drafter.outlook(row, n, history)
            for arm, drafter in self.drafters.items()
            if self.controller.may_name(row, arm)
        }
        return {arm: expected for arm, expected in found.items() if expected is None or expected > 1}

    def draft(self, requests: RoundBatch, routes: Sequence[str]) -> Proposal:
        """Each arm drafts for its own requests; the results are laid side by side."""
        widths, confidences = [1] * len(routes), [[] for _ in routes]  # type: list[int], list[list[float]]
        if not any(route in self.drafters for route in routes):
            return Proposal(requests.bonus.new_empty((len(routes), 0)), widths, confidences)
        tokens = torch.zeros((len(routes), self.widest), dtype=torch.int64, device=requests.bonus.device)
        tails: dict[int, Sequence[int]] = {}
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
            index = torch.tensor(members, device=tokens.device)
            tokens[index, : drafts.tokens.shape[1]] = drafts.tokens
            counts = drafts.counts.tolist()
            for i, count in zip(members, counts, strict=True):
                widths[i] = count + 1
            if drafts.confidences is not None:
                for i, own in zip(members, drafts.confidences.tolist(), strict=True):
                    confidences[i] = own
            tails |= self._tails(requests, members, arm, drafts, counts)
            self.clock.drafted(time.perf_counter() - began + catch_up)
        _append(tails, tokens, widths)
        return Proposal(tokens[:, : max(widths) - 1], widths, confidences)

    def _tails(
        self, requests: RoundBatch, members: Sequence[int], arm: str, drafts: Drafts, counts: Sequence[int]
    ) -> dict[int, Sequence[int]]:
        """Request → what another arm knows to follow its drafts of `arm`, such as the copy that a chain leads into."""
        others = [d for d in self.drafters.values() if d.prolongs and d.arm != arm]
        joining = [(at, i) for at, i in enumerate(members) if self.controller.may_join(requests.row_ids[i])]
        if not (others and joining and drafts.alive is not None):
            return {}
        tokens, alive, worth = drafts.tokens.tolist(), drafts.alive.tolist(), self.controller.worth(arm)
        tails = {}
        for at, i in joining:
            count = counts[at]
            room = min(self.widest, requests.budgets[i] - 1) - count
            if room > 0:
                given = (requests.row_ids[i], tokens[at][:count], alive[at][count - 1], room, worth)
                tails[i] = max((other.prolong(*given) for other in others), key=len)
        return tails

    def _batch(self, requests: RoundBatch, members: list[int], drafter: Drafter) -> DraftBatch:
        limits = [min(drafter.max_drafts, requests.budgets[i] - 1) for i in members]
        index, caps = torch.tensor([members, limits], device=requests.rows.device)
        rows, starts = requests.rows[index], requests.starts[index]
        return DraftBatch(
            rows=rows,
            row_ids=[requests.row_ids[i] for i in members],
            lengths=[requests.lengths[i] for i in members],
            starts=starts,
            bonus=requests.bonus[index],
            tail=self.sync.rings.tail(rows, starts),
            slot_table=self.slot_table,
            limits=limits,
            caps=caps,
            calibration=torch.tensor(drafter.calibration(), dtype=torch.float32, device=rows.device),
            worth=self.controller.worth(drafter.arm),
        )


def _append(tails: Mapping[int, Sequence[int]], tokens: torch.Tensor, widths: list[int]) -> None:
    """Write tails behind their requests' drafts, all in one transfer, and widen these."""
    cells = [(i, widths[i] - 1 + k, token) for i, tail in tails.items() for k, token in enumerate(tail)]
    if not cells:
        return
    rows, columns, values = torch.tensor(cells, device=tokens.device).T
    tokens[rows, columns] = values
    for i, tail in tails.items():
        widths[i] += len(tail)

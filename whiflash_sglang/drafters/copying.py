"""Copying from a request's own text on the device, where the host would know the text a round late.

The host's index learns how far copies can be trusted, from the text as it becomes known, and keeps what tenants share;
the device finds and judges the copies of a round (`propose_copies`).
"""

import torch
from whiflash_kernels import Copies, propose_copies

from whiflash_sglang.drafters.base import DraftBatch, Drafts, Grown
from whiflash_sglang.lookup.calibration import BUCKETS, Agreement


class DeviceCopies:
    """Where every request's last copy came from, and copies of a round.

    Args:
        min_match: shortest match worth copying from, in tokens. most: tokens of a copy.
    """

    def __init__(self, min_match: int, most: int) -> None:
        self._min_match, self._most = min_match, most
        self._back: torch.Tensor | None = None
        """[request rows] int64: tokens from where a request copies to its text's end; 0 where it has not copied."""
        self._buckets: torch.Tensor | None = None

    @staticmethod
    def bytes_for(rows: int) -> int:
        """What it keeps for so many request rows, from its first copy on."""
        return rows * torch.int64.itemsize + len(BUCKETS) * torch.int32.itemsize

    def begin(self, row: int) -> None:
        """Another request begins in `row`."""
        if self._back is not None:
            self._back[row] = 0

    def draft(self, batch: DraftBatch, worth: float) -> Drafts:
        """What follows each request's text, as far as its tokens are accepted with a chance of `worth`."""
        lengths = batch.starts + 1
        alive = torch.ones_like(lengths, dtype=torch.float32)
        copies = self._propose(batch, lengths, batch.caps, alive, worth, keep_first=True)
        assert self._back is not None
        back = torch.where(copies.matched > 0, lengths - copies.sources, self._back[batch.rows])
        self._back.index_copy_(0, batch.rows, back)
        return Drafts(copies.tokens, copies.widths, copies.alive)

    def prolong(self, grown: Grown, worth: float) -> Drafts:
        """What follows each request's drafts, which go behind its text first."""
        batch, drafts = grown.batch, grown.drafts
        assert batch.text is not None
        assert drafts.alive is not None
        columns = batch.starts[:, None] + torch.arange(
            1, drafts.tokens.shape[1] + 1, device=batch.rows.device
        )
        batch.text[batch.rows[:, None], columns] = drafts.tokens
        last = drafts.alive.gather(1, (drafts.counts - 1).clamp(min=0)[:, None]).squeeze(1)
        left = torch.where(drafts.counts > 0, grown.caps - drafts.counts, 0).clamp(min=0)
        lengths = batch.starts + 1 + drafts.counts
        copies = self._propose(batch, lengths, left, last, worth, keep_first=False)
        return Drafts(copies.tokens, copies.widths, copies.alive)

    def _propose(
        self,
        batch: DraftBatch,
        lengths: torch.Tensor,
        limits: torch.Tensor,
        alive: torch.Tensor,
        worth: float,
        *,
        keep_first: bool,
    ) -> Copies:
        assert batch.text is not None
        if self._back is None or self._buckets is None:
            with torch.inference_mode(False):  # else it could not be written outside of it
                self._back = torch.zeros(len(batch.text), dtype=torch.int64, device=lengths.device)
                self._buckets = torch.tensor(BUCKETS, dtype=torch.int32, device=lengths.device)
        back = self._back[batch.rows]
        size = len(batch)
        return propose_copies(
            batch.text,
            batch.rows,
            lengths,
            torch.where(back > 0, lengths - back, 0),
            limits,
            alive,
            batch.calibration[:size],
            batch.calibration[size:].view(size, len(BUCKETS), len(Agreement)),
            self._buckets,
            width=self._most,
            worth=worth,
            min_match=self._min_match,
            keep_first=keep_first,
        )

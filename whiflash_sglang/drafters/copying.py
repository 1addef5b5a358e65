"""Copying from a request's own text on the device, where the host would know the text a round late.

The host's index learns how far copies can be trusted, from the text as it becomes known, and keeps what tenants share;
the device finds and judges the copies of a round (`propose_copies`).
"""

import torch
from whiflash_kernels import Copies, Drafts, propose_copies

from whiflash_sglang.core import DraftBatch
from whiflash_sglang.device.transfers import sent
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
            self._back[row].fill_(0)  # assigning a number copies it, for which the host would wait

    def propose(self, batch: DraftBatch, worth: float, drafts: Drafts | None = None) -> Copies:
        """Copies that follow each request's text, or its drafts after it, as far as tokens are accepted with a chance
        of `worth`.
        """
        behind = None
        if drafts is not None:
            assert drafts.alive is not None
            behind = drafts.counts, drafts.alive
        assert batch.text is not None
        if self._back is None or self._buckets is None:
            with torch.inference_mode(False):  # else it could not be written outside of it
                self._back = torch.zeros(len(batch.text), dtype=torch.int64, device=batch.caps.device)
                self._buckets = sent(BUCKETS, batch.caps.device).to(torch.int32)
        size = len(batch)
        return propose_copies(
            batch.text,
            batch.rows,
            batch.starts,
            self._back,
            batch.caps,
            batch.calibration[:size],
            batch.calibration[size:].view(size, len(BUCKETS), len(Agreement)),
            self._buckets,
            width=self._most,
            worth=worth,
            min_match=self._min_match,
            behind=behind,
        )

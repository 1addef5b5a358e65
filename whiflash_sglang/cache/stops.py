"""The tokens that end running requests, on the device: a block ends at the first of them."""

from collections.abc import Sequence

import torch
from whiflash_kernels import Committed

FEW = 8
"""Tokens that may end a request for which there is room from the start."""

NO_TOKEN = -1


class StopTable:
    """`[request rows, FEW or more]` int64, `NO_TOKEN` where a request has fewer.

    Plain decoding never comes to what lies behind such a token: neither the engine nor anything of ours may learn of
    it.
    """

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.data = torch.full((rows, FEW), NO_TOKEN, dtype=torch.int64, device=device)

    @staticmethod
    def bytes_for(rows: int) -> int:
        """What such a table takes, until a request has more than `FEW` stops."""
        return rows * FEW * torch.int64.itemsize

    def begin(self, row: int, stops: Sequence[int]) -> None:
        """A request begins in `row` that each of `stops` ends; empty: none does."""
        missing = len(stops) - self.data.shape[1]
        if missing > 0:
            with torch.inference_mode(False):  # else it could not be written outside of it
                self.data = torch.nn.functional.pad(self.data, (0, missing), value=NO_TOKEN)
        own = [*stops, *[NO_TOKEN] * (self.data.shape[1] - len(stops))]
        self.data[row] = torch.tensor(own, device=self.data.device)

    def until_stops(self, committed: Committed, rows: torch.Tensor) -> Committed:
        """`committed` without what lies behind a stop. rows: [B] int64 request rows."""
        tokens, accept_lens = committed.tokens, committed.accept_lens
        width = tokens.shape[1]
        if width == 1:
            return committed
        stops = (tokens[:, :, None] == self.data[rows][:, None, :]).any(2)
        column = torch.arange(1, width + 1, dtype=accept_lens.dtype, device=tokens.device)
        first = torch.where(stops, column, width).amin(1)
        kept = torch.minimum(accept_lens, first)
        bonus = tokens.gather(1, kept[:, None].long() - 1).squeeze(1)
        seq_lens = committed.seq_lens - (accept_lens - kept)
        return Committed(kept, tokens, bonus, seq_lens)

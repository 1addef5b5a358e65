"""The text of running requests, on the device: what penalties count, and what is looked up and copied.

The host's lists lag behind rounds that are still running, this table does not.
"""

from collections.abc import Sequence

import numpy as np
import torch


class TokenTable:
    """`[request rows, context + margin]` int64; entry (r, p) is the token at position p while p <= n.

    Args:
        margin: the widest block that `put_block` may write past the context's end.
    """

    def __init__(self, rows: int, context: int, margin: int, device: torch.device | str) -> None:
        self.data = torch.zeros((rows, context + margin), dtype=torch.int64, device=device)

    @staticmethod
    def bytes_for(rows: int, context: int, margin: int) -> int:
        """What such a table takes."""
        return rows * (context + margin) * torch.int64.itemsize

    def begin(self, row: int, *texts: Sequence[int]) -> None:
        """What a request brings along, one text behind the other: its prompt, its output before a retraction."""
        tokens = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
        self.data[row, : len(tokens)] = torch.from_numpy(tokens)

    def put_block(self, rows: torch.Tensor, starts: torch.Tensor, tokens: torch.Tensor) -> None:
        """tokens [B, W] from positions starts [B]; what lies beyond a request's new length is overwritten later."""
        if not tokens.shape[1]:
            return
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        self.data[rows[:, None], starts[:, None] + offsets] = tokens

"""The generated tokens of running requests whose penalties count them, on the device.

Penalties count the tokens generated so far, drafts included; the host's lists lag a round under overlap
scheduling, this table does not.
"""

from collections.abc import Sequence

import torch


class TokenTable:
    """`[request rows, context + margin]` int64; entry (r, p) is the token at position p while p <= n.

    The worker writes rounds in which some request is penalised; the rows of others may lack tokens.

    Args:
        margin: the widest block that `put_block` may write past the context's end.
    """

    def __init__(self, rows: int, context: int, margin: int, device: torch.device | str) -> None:
        self.data = torch.zeros((rows, context + margin), dtype=torch.int64, device=device)

    @staticmethod
    def bytes_for(rows: int, context: int, margin: int) -> int:
        """What such a table takes."""
        return rows * (context + margin) * torch.int64.itemsize

    def begin(self, row: int, start: int, tokens: Sequence[int]) -> None:
        """Tokens that a request brings along from position `start` (its output so far, after a retraction)."""
        if tokens:
            self.data[row, start : start + len(tokens)] = torch.as_tensor(list(tokens), dtype=torch.int64)

    def put_block(self, rows: torch.Tensor, starts: torch.Tensor, tokens: torch.Tensor) -> None:
        """tokens [B, W] from positions starts [B]; what lies beyond a request's new length is overwritten later."""
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        self.data[rows[:, None], starts[:, None] + offsets] = tokens

"""Drafts that the host knows, as the device takes them."""

from collections.abc import Sequence

import torch

from whiflash_sglang.core import Drafts


def padded(tokens: Sequence[Sequence[int]], alive: Sequence[Sequence[float]], device: torch.device) -> Drafts:
    """Drafts of different lengths side by side, for which no model ran.

    Args:
        tokens: per request. alive: the chance that each of them and all before it are right.
    """
    counts = [len(own) for own in tokens]
    widest = max(counts, default=0)

    def rows(values: Sequence[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
        laid = [[*own, *[0] * (widest - len(own))] for own in values]
        return torch.tensor(laid, dtype=dtype).view(len(counts), widest).to(device)

    return Drafts(
        rows(tokens, torch.int64),
        torch.tensor(counts, device=device),
        alive=rows(alive, torch.float32),
        passes=0,
    )

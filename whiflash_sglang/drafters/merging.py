"""Drafts of several arms, side by side and one behind the other, and as many of them as there are rows for."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from whiflash_sglang.drafters.base import Drafts


def lay(own: Drafts, index: torch.Tensor, drafts: Drafts) -> None:
    """Write an arm's drafts into those of the batch, for the requests in `index` [M] int64."""
    width = min(own.tokens.shape[1], drafts.tokens.shape[1])
    drafts.tokens[:, :width].index_copy_(0, index, own.tokens[:, :width])
    drafts.counts.index_copy_(0, index, own.counts)
    if own.alive is not None and drafts.alive is not None:
        drafts.alive[:, :width].index_copy_(0, index, own.alive[:, :width])
    if own.confidences is not None and drafts.confidences is not None:
        width = min(own.confidences.shape[1], drafts.confidences.shape[1])
        drafts.confidences[:, :width].index_copy_(0, index, own.confidences[:, :width])


def behind(drafts: Drafts, more: Drafts) -> Drafts:
    """`more` behind the drafts of every request, or behind the first of them (`Drafts.after`). The result is as wide as
    `drafts`.
    """
    width, extra = drafts.tokens.shape[1], more.tokens.shape[1]
    kept = drafts.counts if more.after is None else more.after
    column = kept[:, None] + torch.arange(extra, device=drafts.counts.device)
    tokens = F.pad(drafts.tokens, (0, extra)).scatter_(1, column, more.tokens)[:, :width]
    alive = drafts.alive
    if alive is not None:
        theirs = torch.zeros_like(more.tokens, dtype=alive.dtype) if more.alive is None else more.alive
        alive = F.pad(alive, (0, extra)).scatter_(1, column, theirs)[:, :width]
    return replace(drafts, tokens=tokens, alive=alive, counts=kept + more.counts)


def bucket_of(rows: int) -> int:
    """Rows of a verification that is to hold `rows`: 1, 2, 3, 4, 6, 8, 12, 16, 24, … so that there are few sizes."""
    power = 1 << max(rows - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


def likeliest(drafts: Drafts, room: int) -> torch.Tensor:
    """[B] int64: how many drafts of each request are among the `room` likeliest of the batch.

    A draft is worth nothing without those before it, and never likelier: so these are the first of every request.
    """
    assert drafts.alive is not None
    size, width = drafts.alive.shape
    if size * width <= room:
        return drafts.counts
    column = torch.arange(width, device=drafts.counts.device)
    alive = torch.where(column < drafts.counts[:, None], drafts.alive, -1.0)
    # Depth by depth, so that of equals the earlier one stays.
    order = alive.T.reshape(-1).argsort(descending=True, stable=True)[:room]
    kept = torch.zeros(width * size, dtype=torch.int64, device=order.device).index_fill_(0, order, 1)
    return torch.minimum(kept.view(width, size).sum(0), drafts.counts)

"""Routing statistics in plain torch."""

import torch
from torch import Tensor

from whiflash_kernels.structs import RoutingStats

MASKED = -1e30
"""Logits at or below this have probability zero."""

_FAR = -1e4
"""Replaces -inf relative to the maximum: exp(-1e4) is 0 in float32, and 0 * -1e4 is 0, not NaN."""

_CHUNK_ELEMENTS = 1 << 17
"""Logits taken at a time: the float32 copies then stay in cache and out of fresh pages, which made 8 rows of a
vocabulary of 49,152 four times faster than one pass over all of them."""


def routing_stats(logits: Tensor, rows: Tensor | None) -> RoutingStats:
    """See `whiflash_kernels.routing.routing_stats`."""
    if rows is not None:
        logits = logits[rows]
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    if logits.shape[0] <= step:
        return _stats(logits)
    parts = [_stats(chunk) for chunk in torch.split(logits, step)]
    return RoutingStats(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _stats(logits: Tensor) -> RoutingStats:
    # A copy even of float32 logits: it is overwritten below.
    relative = logits.to(torch.float32, copy=True)
    largest, argmax = relative.max(dim=-1, keepdim=True)
    live = (largest > MASKED).float()
    relative.sub_(largest.clamp_min_(MASKED)).clamp_min_(_FAR)
    # Not torch.softmax: on some processors it adds a row's weights one after another, and half of float32's
    # digits are gone at 256 k words. `sum` adds pairwise.
    weights = relative.exp()
    total = weights.sum(dim=-1, keepdim=True).clamp_min_(1.0)  # below 1 only where all is masked
    mean = relative.mul_(weights).sum(dim=-1, keepdim=True) / total
    # With the first maximum struck out, the largest of the rest is the runner-up, ties included.
    runner_up = weights.scatter_(1, argmax, 0.0).amax(dim=-1, keepdim=True)
    return RoutingStats(
        entropy=(live * (total.log() - mean).clamp_min_(0.0)).squeeze(1),
        top1=(live / total).squeeze(1),
        margin=(live * (1.0 - runner_up) / total).squeeze(1),
        argmax=(argmax * live.long()).squeeze(1),
    )

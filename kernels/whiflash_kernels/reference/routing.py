"""Routing statistics in plain torch."""

import torch
from torch import Tensor

from whiflash_kernels.structs import RoutingStats

MASKED = -1e30
"""Logits at or below this have probability zero; finite, so that 0 * MASKED is 0 and not NaN."""


def routing_stats(logits: Tensor, rows: Tensor | None) -> RoutingStats:
    """See `whiflash_kernels.routing.routing_stats`."""
    if rows is not None:
        logits = logits[rows]
    largest, argmax = logits.max(dim=-1, keepdim=True)
    # The second largest comes from a top-k of the raw dtype: it reads half the bytes of an fp32 copy.
    second = logits.topk(2, dim=-1).values[:, 1:].float() if logits.shape[1] > 1 else None
    largest = largest.float().clamp_min(MASKED)
    shifted = logits.float().clamp_min_(MASKED).sub_(largest)
    weights = shifted.exp()
    total = weights.sum(dim=-1, keepdim=True)
    mean_shifted = torch.linalg.vecdot(weights, shifted, dim=-1).unsqueeze(1) / total
    runner_up = 0.0 if second is None else (second - largest).exp()
    top1 = total.reciprocal()
    live = (largest > MASKED).float()
    return RoutingStats(
        entropy=((total.log() - mean_shifted) * live).squeeze(1),
        top1=(top1 * live).squeeze(1),
        margin=(top1 * (1.0 - runner_up) * live).squeeze(1),
        argmax=(argmax * live.long()).squeeze(1),
    )

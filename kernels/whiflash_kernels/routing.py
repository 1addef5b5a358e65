"""Entropy, top-1 probability and argmax of the target's distribution, in one read of its logits."""

import torch
from torch import Tensor

from whiflash_kernels.dispatch import op

MASKED = -1e30
"""Logits at or below this have probability zero."""
_FAR = -1e4
"""Replaces -inf relative to the maximum: exp(-1e4) is 0 in float32, and 0 * -1e4 is 0, not NaN."""
_CHUNK_ELEMENTS = 1 << 17
"""Logits taken at a time: the float32 copies then stay in cache and out of fresh pages, which made 8 rows of a
vocabulary of 49,152 four times faster than one pass over all of them."""


def check_logits(logits: Tensor, rows: Tensor | None = None) -> None:
    """Raise ValueError unless logits are [rows, V], V > 0, contiguous along the vocabulary."""
    if logits.ndim != 2 or logits.shape[1] == 0 or (logits.shape[0] and logits.stride(1) != 1):
        raise ValueError(
            "logits must be [rows, vocabulary], contiguous along the vocabulary, got shape "
            f"{tuple(logits.shape)} and strides {logits.stride()}"
        )


@op(check_logits)
def routing_stats(logits: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute entropy, top-1 probability and argmax of each row's softmax.

    With m = max x, z = sum exp(x - m): entropy = ln z - sum (x - m) exp(x - m) / z, top1 = 1 / z, argmax = the
    first index of m.

    Args:
        logits: [M, V] bf16, fp16 or fp32, last dimension contiguous; read only. Entries at or below -1e30
            (-inf from a grammar mask, or a dtype's lowest value) have probability zero.
        rows: [R] int64 or int32, rows of ``logits`` to read, so that one position of each request is read
            without copying it out first; None reads all M.

    Returns:
        entropy in nats, top1, [R] float32 each, and argmax [R] int64. A fully masked row has 0 in all three:
        top1 = 0 occurs nowhere else and marks it. Rows holding NaN or +inf have no distribution: theirs
        are unspecified.

    Raises:
        ValueError: ``logits`` is not two-dimensional, is not contiguous along the vocabulary, or V is 0.

    Grid: (R, splits), each program reads one slice of a row once; a second launch merges the slices when a
    row is split to fill the chip.
    Numerics: float32 throughout; base-2 exponentials relative to each thread's running maximum.
    Fallback: torch (max, exp, sum, dot over a float32 copy).
    Compared: torch needs four reads of the logits or their float32 copy; FlashInfer's softmax and top-k write
    the distribution out; SGLang has an argmax kernel (``row_argmax.py``) and no entropy. Liger-Kernel's fused
    cross-entropy keeps the same online maximum and sum. None gives the three in one read.
    Source: WhiFlash, arXiv 2606.07710 (entropy router); online softmax, arXiv 1805.02867.
    """
    if rows is not None:
        logits = logits[rows]
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    if logits.shape[0] <= step:
        return _stats(logits)
    parts = [_stats(chunk) for chunk in torch.split(logits, step)]
    entropy, top1, argmax = map(torch.cat, zip(*parts, strict=True))
    return entropy, top1, argmax


def _stats(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Float32 logits are copied, too, because the copy is overwritten below.
    relative = logits.to(torch.float32, copy=True)
    largest, argmax = relative.max(dim=-1, keepdim=True)
    live = (largest > MASKED).float()
    relative.sub_(largest.clamp_min_(MASKED)).clamp_min_(_FAR)
    # Not torch.softmax: on some processors it adds a row's weights one after another, and half of float32's
    # digits are gone at 256 k words. `sum` adds pairwise.
    weights = relative.exp()
    total = weights.sum(dim=-1, keepdim=True).clamp_min_(1.0)  # below 1 only if all tokens are masked
    mean = relative.mul_(weights).sum(dim=-1, keepdim=True) / total
    entropy = live * (total.log() - mean).clamp_min_(0.0)
    return entropy.squeeze(1), (live / total).squeeze(1), (argmax * live.long()).squeeze(1)

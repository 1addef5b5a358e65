"""Routing statistics of the target's distribution, in one read of its logits."""

from torch import Tensor

from whiflash_kernels.dispatch import implementation
from whiflash_kernels.structs import RoutingStats


def routing_stats(logits: Tensor, rows: Tensor | None = None) -> RoutingStats:
    """Entropy, top-1 probability, top-1/top-2 margin and argmax of each row's softmax.

    With m = max x, z = sum exp(x - m): entropy = ln z - sum (x - m) exp(x - m) / z, top1 = 1 / z,
    margin = (1 - exp(second - m)) / z, argmax = the first index of m.

    Args:
        logits: [M, V] bf16, fp16 or fp32, last dimension contiguous; read only. Entries at or below -1e30
            (-inf from a grammar mask, or a dtype's lowest value) have probability zero.
        rows: [R] int64 or int32, rows of ``logits`` to read, so that one position of each request is read
            without copying it out first; None reads all M.

    Returns:
        Four [R] tensors. A fully masked row has entropy, top1 and margin 0 and argmax 0: top1 = 0 occurs
        nowhere else and marks it. Rows holding NaN or +inf have no distribution: theirs are unspecified.

    Raises:
        ValueError: ``logits`` is not two-dimensional, is not contiguous along the vocabulary, or V is 0.

    Grid: (R, splits), each program reads one slice of a row once; a second launch merges the slices when a
    row is split to fill the chip.
    Numerics: float32 throughout; base-2 exponentials relative to each thread's running maximum.
    Fallback: torch (max, top-k, exp, sum, dot over a float32 copy).
    Compared: torch needs five reads of the logits or their float32 copy; FlashInfer's softmax and top-k write
    the distribution out; SGLang has an argmax kernel (``row_argmax.py``) and no entropy. Liger-Kernel's fused
    cross-entropy keeps the same online maximum and sum. None gives the four in one read.
    Source: WhiFlash, arXiv 2606.07710 (entropy router); online softmax, arXiv 1805.02867.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or (logits.shape[0] and logits.stride(1) != 1):
        raise ValueError(
            "logits must be [rows, vocabulary], contiguous along the vocabulary, got shape "
            f"{tuple(logits.shape)} and strides {logits.stride()}"
        )
    return implementation(logits, "routing").routing_stats(logits, rows)

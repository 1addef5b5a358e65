"""The neural router's MLP: from the target's final hidden state to predicted gains."""

import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.dispatch import op


def _check(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    if w1.shape != (b1.shape[0], hidden.shape[1]) or w2.shape != (b2.shape[0], w1.shape[0]):
        raise ValueError(
            f"router layers {tuple(w1.shape)} + {tuple(b1.shape)} and {tuple(w2.shape)} + {tuple(b2.shape)} "
            f"do not fit each other and hidden states of size {hidden.shape[1]}"
        )


@op(_check)
def router_mlp(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Compute the router's outputs: two linear layers with an exact (erf) GELU between them.

    out = w2 . GELU(w1 . hidden + b1) + b2.

    Args:
        hidden: [B, H] any float dtype, last dimension contiguous; read in the dtype of ``w1``.
        w1: [M, H], contiguous.
        b1: [M].
        w2: [n_out, M], contiguous; the paper has one output, the predicted gain in acceptance length.
        b2: [n_out].

    Returns:
        [B, n_out] float32.

    Raises:
        ValueError: the layers do not fit each other or ``hidden``.

    Grid: (M / block, B / 16) and (B): hidden units are split over the chip, each program reduces its units'
    share of every output, a second launch adds the shares in a fixed order, so results repeat.
    Numerics: products accumulate in float32; the hidden layer is not rounded between the two.
    Fallback: torch, also on a GPU above 64 rows, where cuBLAS is the better tool.
    Compared: torch takes three launches and rounds the hidden layer to bf16 twice; Liger-Kernel's GELU MLPs
    are gated and for training; FlashInfer has none.
    Source: WhiFlash, arXiv 2606.07710 (neural router).
    """
    return in_torch(hidden, w1, b1, w2, b2)


def in_torch(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Compute `router_mlp` in torch."""
    inner = F.gelu(F.linear(hidden.to(w1.dtype), w1, b1))
    return F.linear(inner, w2, b2).float()

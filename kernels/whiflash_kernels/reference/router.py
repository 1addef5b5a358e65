"""The router's two-layer MLP in plain torch."""

import torch.nn.functional as F
from torch import Tensor


def router_mlp(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """See `whiflash_kernels.router.router_mlp`."""
    inner = F.gelu(F.linear(hidden.to(w1.dtype), w1, b1))
    return F.linear(inner, w2, b2).float()

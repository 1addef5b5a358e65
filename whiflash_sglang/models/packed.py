"""Matrices of drafters and targets with a copy for a CPU's matrix kernels (`whiflash_kernels.packed`)."""

from collections.abc import Iterable

import psutil
from torch import Tensor, nn
from whiflash_kernels import packed

MEMORY_SHARE = 0.25
"""Of the memory that is free when copies are made, what they may take."""


class Linear(nn.Linear):
    """`torch.nn.Linear` that multiplies by its weight's packed copy where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        return packed.linear(x, self.weight, self.bias)


def pack(weights: Iterable[Tensor]) -> int:
    """Pack what gains from it, unless that would take more than `MEMORY_SHARE` of the free memory: bytes taken."""
    return packed.pack(weights, MEMORY_SHARE * psutil.virtual_memory().available)


def pack_modules(model: nn.Module) -> int:
    """:func:`pack` for every `Linear` of `model`."""
    return pack(module.weight for module in model.modules() if isinstance(module, Linear))

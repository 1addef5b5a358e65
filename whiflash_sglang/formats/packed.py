"""Give matrices of drafters and targets a packed copy, in blocks or in float8 (`whiflash_kernels.packed`)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn
from whiflash_kernels import packed
from whiflash_kernels.float8 import multiplies

from whiflash_sglang.errors import ConfigError

MEMORY_SHARE = 0.25
"""Largest share of the free memory that packed copies may take."""

_CONTAINER = Path("/sys/fs/cgroup")


class Linear(nn.Linear):
    """`torch.nn.Linear` that multiplies by its weight's packed copy if there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x` [..., K] by the weight, or by its packed copy → [..., N]."""
        return packed.linear(x, self.weight, self.bias)


def free_memory() -> int:
    """Return the free memory in bytes: of the machine, or of the container (cgroup v2) if that has less.

    A container's usage counts the page cache, which the kernel can reclaim, so inactive pages are added: the weights
    have just been read from files.
    """
    free = psutil.virtual_memory().available
    try:
        limit, taken = (int((_CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return min(free, max(0, limit - taken + int(stat.get("inactive_file", 0))))


def pack(weights: Iterable[Tensor], at_most: float | None = None) -> int:
    """Pack the weights that get faster, unless that takes more than `at_most` bytes (None: `MEMORY_SHARE` of the
    free memory). Returns the bytes taken."""
    return packed.pack(weights, MEMORY_SHARE * free_memory() if at_most is None else at_most)


def pack_modules(model: nn.Module) -> int:
    """Pack the weight of every `Linear` of `model`; returns the bytes taken (see :func:`pack`)."""
    return pack(module.weight for module in model.modules() if isinstance(module, Linear))


def quantise_modules(model: Any) -> None:
    """Quantise a drafter's `Linear` weights to float8; arms quantise its head. Raises ConfigError without kernels."""
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
    if weights[0].is_cuda and not multiplies(weights[0]):
        raise ConfigError("quantization: fp8 needs 16 bits and compute capability 8.9; remove the key")
    if (head := model.target_lm_head) is not None:
        model.target_lm_head = head.detach()  # a tensor of its own, so the target's products stay unquantised
    model.quantised = True
    packed.quantise(weights)
    model.eval()  # stacks the projection again, from quantised weights

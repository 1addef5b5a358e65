"""Matrices of drafters and targets with a copy in blocks or in float8 (`whiflash_kernels.packed`)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn
from whiflash_kernels import packed
from whiflash_kernels.float8 import multiplies

from whiflash_sglang.errors import ConfigError

MEMORY_SHARE = 0.25
"""Share of the memory that is free when copies are made, which they may take."""

_CONTAINER = Path("/sys/fs/cgroup")


class Linear(nn.Linear):
    """`torch.nn.Linear` that multiplies by its weight's packed copy where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        return packed.linear(x, self.weight, self.bias)


def free_memory() -> int:
    """Bytes that may still be taken: of the machine, or of the container (cgroup v2) where that has less.

    Pages of files count as a container's own, though the kernel takes back what is not in use of them: and the weights
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
    """Pack what gains from it, unless that would take more than `at_most` bytes, or where none are named more than
    `MEMORY_SHARE` of the free memory: bytes taken."""
    return packed.pack(weights, MEMORY_SHARE * free_memory() if at_most is None else at_most)


def pack_modules(model: nn.Module) -> int:
    """:func:`pack` for every `Linear` of `model`."""
    return pack(module.weight for module in model.modules() if isinstance(module, Linear))


def quantise_modules(model: Any) -> None:
    """Multiply by a loaded drafter's matrices in float8; arms choose its head. Raises ConfigError: no kernels."""
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
    if weights[0].is_cuda and not multiplies(weights[0]):
        raise ConfigError("quantization: fp8 needs 16 bits and compute capability 8.9; remove the key")
    if (head := model.target_lm_head) is not None:
        model.target_lm_head = head.detach()  # with a copy of its own: the target's products stay as they are
    model.quantised = True
    packed.quantise(weights)
    model.eval()  # what it has stacked of them

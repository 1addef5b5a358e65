"""Collective operations of DP attention between CPU ranks, which SGLang registers for accelerators only."""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.distributed import parallel_state


def reg_all_gather_into_tensor(output: torch.Tensor, input: torch.Tensor, group_name: str) -> None:
    """Gather every rank's `input` [N, ...] into `output` [P·N, ...]."""
    _group(group_name)._all_gather_into_tensor(output, input)


def reg_reduce_scatter_tensor(output: torch.Tensor, input: torch.Tensor, group_name: str) -> None:
    """Sum all ranks' `input` [P·N, ...] and write this rank's part into `output` [N, ...]."""
    _group(group_name)._reduce_scatter_tensor(output, input)


def reg_all_to_all_single(output: torch.Tensor, input: torch.Tensor, group_name: str) -> None:
    """Exchange parts: `output` [P·N] receives this rank's part of every rank's `input` [P·N]."""
    _group(group_name)._all_to_all_single(output, input)


def reduce_scatterv(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Reduce and scatter parts of any sizes with SGLang's deterministic method, since its default needs NCCL."""

    def scattered(self: Any, input_: torch.Tensor, output: Any = None, sizes: Any = None) -> torch.Tensor:
        found: torch.Tensor = self._deterministic_reduce_scatterv(input_, output, sizes)
        return found

    return scattered


def _group(name: str) -> parallel_state.GroupCoordinator:
    group = parallel_state._groups[name]()
    if group is None:
        raise ValueError(f"the group {name} of ranks has ended")
    return group

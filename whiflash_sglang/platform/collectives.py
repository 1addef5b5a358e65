"""Collective calls of DP attention between CPU ranks, which SGLang registers for accelerators only."""

import torch
from sglang.srt.distributed import parallel_state


def reg_all_gather_into_tensor(output: torch.Tensor, input: torch.Tensor, group_name: str) -> None:
    """[P·N, ...] `output` of every rank's [N, ...] `input`."""
    _group(group_name)._all_gather_into_tensor(output, input)


def reg_reduce_scatter_tensor(output: torch.Tensor, input: torch.Tensor, group_name: str) -> None:
    """This rank's [N, ...] `output` of the sum of all ranks' [P·N, ...] `input`."""
    _group(group_name)._reduce_scatter_tensor(output, input)


def _group(name: str) -> parallel_state.GroupCoordinator:
    group = parallel_state._groups[name]()
    if group is None:
        raise ValueError(f"the group {name} of ranks has ended")
    return group

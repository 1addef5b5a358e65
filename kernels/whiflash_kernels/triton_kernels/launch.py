"""Sizes of launches, shared by the Triton kernels."""

from functools import lru_cache

import torch
from triton.runtime import driver

MODELLED_MULTIPROCESSORS = 132
"""Multiprocessors assumed without a device to ask (ahead-of-time compilation, the interpreter): an H100's or H200's."""


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of ``device``, or an H100's if it is not a CUDA device."""
    if device.type != "cuda":
        return MODELLED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def is_hopper(tensor: torch.Tensor) -> bool:
    """Whether a kernel for ``tensor`` is compiled for sm_90: for the tensor's device, or ahead of time."""
    if tensor.is_cuda:
        return torch.cuda.get_device_capability(tensor.device)[0] == 9
    return tensor.is_meta and int(driver.active.get_current_target().arch) == 90


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least ``count`` and 1, as Triton's block shapes require."""
    return 1 << max(count - 1, 0).bit_length()


FEWEST_LANES, FEWEST_COLUMNS = 64, 32


def lanes(requests: int) -> int:
    """Return the lanes of a program that looks at all ``requests``: few sizes, since a kernel is compiled for each."""
    return power_of_two(max(requests, FEWEST_LANES))


def draft_columns(width: int) -> int:
    """Return the columns of a Triton block for ``width`` drafts: few sizes, since a kernel is compiled for each."""
    return power_of_two(max(width, FEWEST_COLUMNS))

"""Answers of `torch.cuda` for an H100 with 80 GB, without one."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from sites import site
from streams import Streams

GIGABYTE = 1 << 30
MEMORY = 80 * GIGABYTE
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=MEMORY,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block_optin=232448,
    regs_per_multiprocessor=65536,
    L2_cache_size=50 * (1 << 20),
    is_integrated=0,
    is_multi_gpu_board=0,
    gcnArchName="",
    uuid="00000000-0000-0000-0000-000000000000",
)


@contextmanager
def answers(world: Streams) -> Iterator[None]:
    """`torch.cuda` answers as on a machine with one H100, and its streams are those of `world`."""

    def synchronize(device: Any = None) -> None:
        world.waits_of_host[site()] += 1
        for stream in world.streams:
            world.host_waits(world.clock_of(stream))

    first = torch.cpu.current_stream()
    said: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_arch_list": lambda: ["sm_80", "sm_90", "sm_100", "sm_120"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (MEMORY - GIGABYTE, MEMORY),
        "memory_allocated": lambda device=None: GIGABYTE,
        "max_memory_allocated": lambda device=None: GIGABYTE,
        "memory_reserved": lambda device=None: GIGABYTE,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_stats": lambda device=None: Counter(),
        "current_blas_handle": lambda: 0,
        "synchronize": synchronize,
        "current_stream": lambda device=None: torch.cpu.current_stream(),
        "default_stream": lambda device=None: first,
        "stream": torch.cpu.stream,
        "StreamContext": torch.cpu.StreamContext,
        "set_stream": torch.cpu.stream,
    }
    with ExitStack() as stack:
        for name, answer in said.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        yield

"""Serving on a CPU: whether this machine does, and the defaults there for what the user has not set.

The package `whiflash_cpu/` serves there. torch is imported only when a function is called.
"""

import os

PLATFORM = "whiflash_cpu"
"""Name of the platform's entry point, as `SGLANG_PLATFORM` takes it."""

ATTENTION_BACKEND = "whiflash_cpu"
"""Name of this package's attention backend in SGLang's registry and flags."""

CHILD_ENVIRONMENT = {
    # A dozen of SGLang's helpers are decorated with torch.compile when their modules load. On a CPU that needs a C++
    # compiler, takes half a minute at the first request and gains nothing.
    "TORCHDYNAMO_DISABLE": "1",
    # A decoding step is some 200 parallel regions of tens of microseconds, and OpenMP's workers spin between them.
    # A worker that stops before the next region has to be woken, which takes as long as the region. One that spins on
    # takes time from the HTTP server, whose cores it shares. 30 decoder layers, one row, two threads on two cores, in
    # ms on free cores and (mean) beside one and two busy processes: 25.2, 51, 67 with 1,000 turns; 18.3, 47, 50 with
    # 3,000; 17.7, 67, 44 with 6,000; 17.1, 248, 74 with 50,000; OpenMP's own choice is 300,000.
    "GOMP_SPINCOUNT": "3000",
    # Ranks on one machine share its memory, and measure its free part at different moments. SGLang takes a difference,
    # which another process makes in between, for a device that somebody else occupies, and would not start.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}
"""Environment variables that are set, unless the user has, before SGLang starts its scheduler, which reads them."""


def serves_here() -> bool:
    """Whether our CPU platform serves here: torch knows no accelerator, and SGLang's own CPU engine is not chosen by
    ``SGLANG_USE_CPU_ENGINE=1``, or ``SGLANG_PLATFORM`` names ours all the same.
    """
    import torch

    if torch.cuda.is_available() or torch.accelerator.is_available():
        return False
    return os.environ.get("SGLANG_USE_CPU_ENGINE") != "1" or os.environ.get("SGLANG_PLATFORM") == PLATFORM

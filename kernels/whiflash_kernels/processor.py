"""Detects the instructions of this machine's processor."""

import platform
from functools import cache
from pathlib import Path

import torch


def has_avx2() -> bool:
    """Whether this processor has AVX2 and fused multiply-add."""
    return {"avx2", "fma"} <= set(instructions().split())


@cache
def onednn_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor."""
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def instructions() -> str:
    """Return a string that names this processor's instruction set, so that processors may share a directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("flags", "Features", "CPU part")  # x86's, and Arm's
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(names)}))

"""Attention of one new token a row over slots of keys and values, on a CPU read once and no further than they are full.

Products of torch read every slot up to the longest one's end and copy what they are given a part of.
`decode_attention.cpp` does not; it is compiled once for this machine's processor where a compiler is.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from whiflash_sglang.embedded import cache_root

_SOURCE = Path(__file__).with_name("decode_attention.cpp")
_FLAGS = ["-O3", "-march=native", "-ffast-math", "-fPIC"]


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, ends: Tensor, bias: Tensor) -> Tensor:
    """Scaled dot-product attention of each row's newest token.

    Args:
        q: [rows, Hq, D].
        keys: [rows, Hkv, D, capacity], contiguous.
        values: [rows, Hkv, capacity, D], contiguous.
        ends: [rows] int64, the newest token's position.
        bias: [rows * Hkv, 1, max(ends) + 1] float32, minus infinity beyond a row's end.

    Returns:
        [rows, Hq, D] in the dtype of `q`. Scores and sums are of float32 where the compiled one runs, in that dtype
        where torch does.
    """
    compiled = _compiled() if q.dtype == torch.bfloat16 and q.device.type == "cpu" else None
    rows, heads, size, capacity = keys.shape
    scale = float(size**-0.5)
    if compiled is not None and size % 4 == 0:
        q = q.contiguous()
        out = torch.empty_like(q)
        sizes = heads, q.shape[1] // heads, size, capacity, ctypes.c_float(scale)

        def part(first: int, last: int) -> None:
            addresses = [ctypes.c_void_p(x[first:last].data_ptr()) for x in (out, q, keys, values, ends)]
            compiled(*addresses, last - first, *sizes)

        threads = torch.get_num_threads()
        bounds = [rows * index // threads for index in range(threads + 1)]
        spans = [(first, last) for first, last in pairwise(bounds) if first < last]
        if len(spans) == 1:
            part(*spans[0])
        else:  # ctypes lets other threads run while the function does
            deque(_threads(threads).map(part, *zip(*spans, strict=True)), maxlen=0)
        return out
    width = bias.shape[-1]
    grouped = q.reshape(rows * heads, -1, size)
    scores = torch.bmm(grouped, keys.flatten(0, 1)[:, :, :width])
    weights = torch.add(bias, scores, alpha=scale).softmax(-1).to(q.dtype)
    return torch.bmm(weights, values.flatten(0, 1)[:, :width]).view(rows, -1, size)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "decode-attention")


@cache
def _compiled() -> Any:
    """The compiled function, or None where it cannot be had."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    key = hashlib.sha256(
        _SOURCE.read_bytes() + " ".join([compiler, *_FLAGS, _processor()]).encode()
    ).hexdigest()[:12]
    library = cache_root() / "compiled" / f"decode-attention-{key}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            _build(compiler, library)
        return ctypes.CDLL(str(library)).decode_attention
    except (OSError, subprocess.CalledProcessError):
        return None


def _build(compiler: str, library: Path) -> None:
    """Compile and link in two steps: linked with -ffast-math, a library makes its process flush subnormal numbers."""
    with TemporaryDirectory(dir=library.parent) as staged:
        parts, whole = Path(staged) / "parts.o", Path(staged) / "whole.so"
        for command in (
            [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(parts)],
            [compiler, "-shared", str(parts), "-o", str(whole)],
        ):
            subprocess.run(command, check=True, capture_output=True)
        os.replace(whole, library)


def _processor() -> str:
    """What tells this processor's instructions from another's that shares the directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("flags", "Features", "CPU part")  # x86's, and Arm's
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(names)}))

"""Attention of one new token a row over slots of keys and values, on a CPU read once and no further than they are full.

Products of torch read every slot up to the longest one's end and copy what they are given a part of.
`decode_attention.cpp` does not; it is compiled once for this machine's processor where a compiler is.
"""

import ctypes
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from whiflash_kernels.cpu import compiler

from whiflash_sglang.embedded import cache_root

_SOURCE = Path(__file__).with_name("decode_attention.cpp")


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
    try:
        library = compiler.load(_SOURCE, cache_root() / "compiled", ["-ffast-math"])
    except OSError:
        return None
    return library.decode_attention

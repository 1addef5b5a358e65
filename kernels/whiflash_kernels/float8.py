"""Matrices in float8 with a scale per row, half the bytes of 16-bit ones, multiplied by SGLang's compiled kernels."""

from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT8, LARGEST, LEAST = torch.float8_e4m3fn, 448.0, 1e-30
"""The dtype, its largest number, and the smallest scale of a row."""


Float8 = tuple[Tensor, Tensor]
"""A matrix [N, K]: its values, float8_e4m3fn or the same numbers in a wider type, and the scale [N] float32 of rows."""


@cache
def _sglang() -> Any:
    return import_module("sgl_kernel")


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x rounded to `dtype`, clamped for 8 bits as in Triton: some versions of torch make larger numbers NaN."""
    if dtype.itemsize == 1:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


def multiplies(x: Tensor) -> bool:
    """Whether kernels quantise and multiply x: 16 bits, from sm_89 on."""
    narrow = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return narrow and torch.cuda.get_device_capability(x.device) >= (8, 9)


def quantise_rows(x: Tensor, into: Float8 | None = None) -> Float8:
    """Quantise each row of x [N, K], contiguous, to float8 by its scale max(|row|) / 448 (arXiv 2209.05433)."""
    values, scale = into or (torch.empty_like(x, dtype=FLOAT8), x.new_empty(len(x), dtype=torch.float32))
    if multiplies(x):
        _sglang().sgl_per_token_quant_fp8(x, values, scale[:, None])
    else:
        torch.clamp(x.float().abs().amax(-1) / LARGEST, min=LEAST, out=scale)
        values.copy_((x.float() / scale[:, None]).to(FLOAT8))
    return values, scale


def product(x: Tensor, weight: Float8, bias: Tensor | None) -> Tensor:
    """Multiply x [T, K], quantised, by `weight` and add bias [N] → [T, N] in x's dtype; sums are float32.

    If values are wider, sums are rounded once more before they are scaled.
    """
    rows, row_scale = quantise_rows(x)
    values, scale = weight
    if values.dtype == FLOAT8:
        made: Tensor = _sglang().fp8_scaled_mm(rows, values.t(), row_scale[:, None], scale[None], x.dtype, bias)
        return made
    sums = F.linear(rows.to(values.dtype), values).float() * row_scale[:, None] * scale
    return (sums if bias is None else sums + bias).to(x.dtype)

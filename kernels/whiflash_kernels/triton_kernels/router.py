# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The router's MLP for small batches, with the first layer's units spread over the chip."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.router import in_torch
from whiflash_kernels.triton_kernels.launch import power_of_two

MAX_ROWS = 64
"""Largest batch for these kernels: above it cuBLAS's tiles are faster, and launches no longer dominate."""

ROWS = 16
UNITS = 16
DEPTH = 128


@triton.jit(do_not_specialize=["rows", "outputs"])
def _shares_kernel(
    hidden,
    w1,
    b1,
    w2,
    shares,
    rows,
    hidden_size,
    units,
    outputs,
    hidden_stride,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros([ROWS, UNITS], tl.float32)
    for begin in range(0, hidden_size, DEPTH):
        inside = begin + depth < hidden_size
        x = tl.load(
            hidden + row[:, None] * hidden_stride + begin + depth[None, :],
            mask=(row[:, None] < rows) & inside[None, :],
            other=0.0,
        )
        w = tl.load(
            w1 + unit[None, :] * hidden_size + begin + depth[:, None],
            mask=(unit[None, :] < units) & inside[:, None],
            other=0.0,
        )
        x = x.to(w.dtype)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        # The default for float32 would be tf32, with 13 fewer bits.
        sums = tl.dot(x, w, sums, input_precision="ieee")
    sums += tl.load(b1 + unit, mask=unit < units, other=0.0).to(tl.float32)[None, :]
    active = 0.5 * sums * (1.0 + tl.erf(sums * 0.7071067811865476))
    for output in range(outputs):
        weight = tl.load(w2 + output * units + unit, mask=unit < units, other=0.0).to(tl.float32)
        share = tl.sum(active * weight[None, :], axis=1)
        tl.store(shares + (tl.program_id(0) * rows + row) * outputs + output, share, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "outputs", "blocks"])
def _add_shares_kernel(shares, b2, out, rows, outputs, blocks, BLOCKS: tl.constexpr, OUTPUTS: tl.constexpr):
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)[:, None]
    output = tl.arange(0, OUTPUTS)
    mask = (block < blocks) & (output[None, :] < outputs)
    values = tl.load(shares + (block * rows + row) * outputs + output[None, :], mask=mask, other=0.0)
    bias = tl.load(b2 + output, mask=output < outputs, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + output, tl.sum(values, axis=0) + bias, mask=output < outputs)


def router_mlp(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Compute the router's two linear layers with a GELU between them; see `whiflash_kernels.router.router_mlp`."""
    rows, hidden_size = hidden.shape
    units, outputs = w1.shape[0], w2.shape[0]
    if rows > MAX_ROWS:
        return in_torch(hidden, w1, b1, w2, b2)
    out = torch.empty(rows, outputs, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return out
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    blocks = triton.cdiv(units, UNITS)
    shares = torch.empty(blocks, rows, outputs, dtype=torch.float32, device=hidden.device)
    _shares_kernel[(blocks, triton.cdiv(rows, ROWS))](
        hidden,
        w1.contiguous(),
        b1.contiguous(),
        w2.contiguous(),
        shares,
        rows,
        hidden_size,
        units,
        outputs,
        hidden.stride(0),
        ROWS=ROWS,
        UNITS=UNITS,
        DEPTH=DEPTH,
        WIDEN=hidden.device.type == "cpu",  # the interpreter's dot cannot take bf16; wider products are equal
        num_warps=4,
    )
    _add_shares_kernel[(rows,)](
        shares,
        b2.contiguous(),
        out,
        rows,
        outputs,
        blocks,
        BLOCKS=power_of_two(blocks),
        OUTPUTS=power_of_two(outputs),
        num_warps=1,
    )
    return out

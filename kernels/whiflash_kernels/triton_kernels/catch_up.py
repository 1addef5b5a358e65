# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Fused kernels of a KV-only catch-up: the parts before and after its matrix products."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.structs import Eagle3Weights, KVPools
from whiflash_kernels.triton_kernels.launch import power_of_two


@triton.jit
def _write_kv_kernel(
    kv,
    k_norm,
    positions,
    cache_slots,
    rope_table,
    addresses,
    pool_like,
    eps,
    kv_stride,
    rope_stride,
    slot_stride,
    head_stride,
    layers,
    heads,
    HAS_NORM: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0)
    layer = tl.program_id(1)
    slot = tl.load(cache_slots + row).to(tl.int64)
    if slot < 0:
        return
    k_pool = tl.load(addresses + layer).to(pool_like.dtype)
    v_pool = tl.load(addresses + layers + layer).to(pool_like.dtype)
    if ALIGNED:
        k_pool = tl.multiple_of(k_pool, 16)
        v_pool = tl.multiple_of(v_pool, 16)
    dtype = pool_like.dtype.element_ty

    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    mask = (head < heads) & (column < HALF)
    k_source = kv + row.to(tl.int64) * kv_stride + layer * (2 * heads * DIM) + head * DIM
    first = tl.load(k_source + column, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(k_source + HALF + column, mask=mask, other=0.0).to(tl.float32)
    if REST_BLOCK > 0:
        rest_column = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        rest_mask = (head < heads) & (rest_column < DIM)
        rest = tl.load(k_source + rest_column, mask=rest_mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        if REST_BLOCK > 0:
            square += tl.sum(rest * rest, axis=1)
        scale = tl.rsqrt(square / DIM + eps)[:, None]
        norm = k_norm + layer * DIM
        first *= scale * tl.load(norm + column, mask=column < HALF, other=0.0).to(tl.float32)
        second *= scale * tl.load(norm + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
        if REST_BLOCK > 0:
            rest *= scale * tl.load(norm + rest_column, mask=rest_column < DIM, other=0.0).to(tl.float32)

    angles = rope_table + tl.load(positions + row).to(tl.int64) * rope_stride + column
    cosine = tl.load(angles, mask=column < HALF, other=0.0).to(tl.float32)
    sine = tl.load(angles + HALF, mask=column < HALF, other=0.0).to(tl.float32)
    k_target = k_pool + slot * slot_stride + head * head_stride
    tl.store(k_target + column, (first * cosine - second * sine).to(dtype), mask=mask)
    tl.store(k_target + HALF + column, (second * cosine + first * sine).to(dtype), mask=mask)
    if REST_BLOCK > 0:
        tl.store(k_target + rest_column, rest.to(dtype), mask=rest_mask)

    v_column = tl.arange(0, DIM_BLOCK)[None, :]
    v_mask = (head < heads) & (v_column < DIM)
    values = tl.load(k_source + heads * DIM + v_column, mask=v_mask, other=0.0)
    values = values.to(tl.float32).to(dtype)
    tl.store(v_pool + slot * slot_stride + head * head_stride + v_column, values, mask=v_mask)


def write_kv(
    kv: Tensor,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cache_slots: Tensor,
    rope_table: Tensor,
    pools: KVPools,
) -> None:
    """Apply RMSNorm and RoPE to K, and scatter K and V into the pools; see `whiflash_kernels.catch_up.write_kv`."""
    layers, (_, heads, dim) = len(pools.k), pools.k[0].shape
    half = rope_table.shape[1] // 2
    if kv.shape[0] == 0:
        return
    _write_kv_kernel[(kv.shape[0], layers)](
        kv,
        None if k_norm is None else k_norm.contiguous(),
        positions.contiguous(),
        cache_slots.contiguous(),
        rope_table,
        pools.addresses,
        pools.k[0],
        eps,
        kv.stride(0),
        rope_table.stride(0),
        pools.k[0].stride(0),
        pools.k[0].stride(1),
        layers,
        heads,
        HAS_NORM=k_norm is not None,
        DIM=dim,
        HALF=half,
        HEADS=power_of_two(heads),
        HALF_BLOCK=power_of_two(half),
        REST_BLOCK=power_of_two(dim - 2 * half) if dim > 2 * half else 0,
        DIM_BLOCK=power_of_two(dim),
        ALIGNED=pools.aligned,
        num_warps=4,
    )


@triton.jit
def _layer_input_kernel(
    embedding,
    next_tokens,
    fused,
    input_norm,
    hidden_norm,
    out,
    eps,
    hidden,
    embedding_stride,
    fused_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < hidden
    if tl.program_id(1) == 0:
        token = tl.load(next_tokens + row).to(tl.int64)
        x = tl.load(embedding + token * embedding_stride + column, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(input_norm + column, mask=mask, other=0.0).to(tl.float32)
    else:
        x = tl.load(fused + row * fused_stride + column, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(hidden_norm + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    target = out + row * (2 * hidden) + tl.program_id(1) * hidden + column
    tl.store(target, (x * scale * weight).to(out.dtype.element_ty), mask=mask)


def layer_input(fused: Tensor, next_tokens: Tensor, weights: Eagle3Weights) -> Tensor:
    """Return the input of EAGLE-3's layer, [N, 2H]; see `whiflash_kernels.catch_up.layer_input`."""
    rows, hidden = fused.shape
    out = torch.empty(rows, 2 * hidden, dtype=fused.dtype, device=fused.device)
    if rows:
        _layer_input_kernel[(rows, 2)](
            weights.embedding,
            next_tokens.contiguous(),
            fused,
            weights.input_norm,
            weights.hidden_norm,
            out,
            weights.eps,
            hidden,
            weights.embedding.stride(0),
            fused.stride(0),
            BLOCK=power_of_two(hidden),
            num_warps=8,
        )
    return out

"""KV-only catch-up: packed target features to the K and V of a drafter, straight into its paged pools."""

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.dispatch import backend_for, op
from whiflash_kernels.float8 import rounded
from whiflash_kernels.packed import linear
from whiflash_kernels.structs import DFlashWeights, Eagle3Weights, KVPools


def _check(
    features: Tensor,
    positions: Tensor,
    cache_slots: Tensor,
    weights: DFlashWeights | Eagle3Weights,
    rope_table: Tensor,
    pools: KVPools,
) -> None:
    _, heads, dim = pools.k[0].shape
    expected = len(pools.k) * 2 * heads * dim
    if weights.kv.shape[0] != expected:
        raise ValueError(
            f"weights.kv has {weights.kv.shape[0]} rows, the pools need layers * 2 * heads * dim = {expected}"
        )
    if features.shape[1] != weights.fc.shape[1]:
        raise ValueError(f"features have {features.shape[1]} columns, weights.fc takes {weights.fc.shape[1]}")
    if rope_table.shape[1] > dim or rope_table.shape[1] % 2:
        raise ValueError(f"rope_table has {rope_table.shape[1]} columns, needs an even number up to {dim}")
    if not features.shape[0] == positions.shape[0] == cache_slots.shape[0]:
        raise ValueError(
            f"features, positions and cache_slots differ in rows: {features.shape[0]}, "
            f"{positions.shape[0]}, {cache_slots.shape[0]}"
        )
    if isinstance(weights, Eagle3Weights) and len(pools.k) != 1:
        raise ValueError(f"the KV-only pass is exact for one-layer EAGLE-3 only, got pools of {len(pools.k)} layers")


@torch.no_grad()
def dflash_catch_up(
    features: Tensor, positions: Tensor, cache_slots: Tensor, weights: DFlashWeights, rope_table: Tensor, pools: KVPools
) -> Tensor:
    """Write K and V of every DFlash layer for N context positions.

    fused = RMSNorm(fc . feature); for each layer K = RoPE(RMSNorm_k(W_k . fused)), V = W_v . fused;
    pool[slot] = K, V. The K and V of a position depend on its feature alone, so this is exact for any number
    of layers, and the projections of all layers are one matrix product.

    Args:
        features: [N, C*Ht], the drafter's chunks in its own order; dtype of the weights.
        positions: [N] int64, rotary positions.
        cache_slots: [N] int64, pairwise different; negative ones are skipped (padding rows of `unpark`).
        weights: `DFlashWeights`.
        rope_table: [max_position, R] float32, cosines in the first R/2 columns and sines in the rest
            (SGLang's ``cos_sin_cache``), neox halves; R <= D is the rotary width, the rest passes through.
        pools: `KVPools` of L layers, written in place; the products are rounded to the pools' dtype.

    Returns:
        fused, [N, H] in the dtype of ``features``.

    Raises:
        ValueError: the weights, table or pools do not fit each other.

    Grid of the epilogue: (N, L), all KV heads of one layer in a program.
    Numerics: products in the weights' dtype with float32 accumulation (the library's), norms and rotation in
    float32, one rounding at the store.
    Fallback: torch.
    Compared: SGLang's ``FusedKVMaterializeHelper`` makes the same two products, norm and rotation, but into a
    workspace that L pool writes then read again; here the epilogue stores to the pools, so K and V
    are written once and the 1 + L launches after the second product become one. The products are torch's
    (cuBLAS), the hidden norm is ``torch.nn.functional.rms_norm``. FlashInfer's paged append takes K and V that
    are already rotated, and its fused rotate-and-append is for FP8 caches.
    Source: DFlash, arXiv 2602.06036; KV-only Prefill, WhiFlash, arXiv 2606.07710.
    """
    _check(features, positions, cache_slots, weights, rope_table, pools)
    fused = rms_norm(linear(features, weights.fc, weights.fc_bias), weights.hidden_norm, weights.eps)
    kv = linear(fused, weights.kv, weights.kv_bias)
    write_kv(kv, weights.k_norm, weights.k_eps or weights.eps, positions, cache_slots, rope_table, pools)
    return fused


@torch.no_grad()
def eagle3_catch_up(
    features: Tensor,
    next_tokens: Tensor,
    positions: Tensor,
    cache_slots: Tensor,
    weights: Eagle3Weights,
    rope_table: Tensor,
    pools: KVPools,
) -> Tensor:
    """Write K and V of EAGLE-3's one layer for N positions.

    fused = fc . feature (after the checkpoint's optional norms); x = [RMSNorm_in(embedding[next token]) |
    RMSNorm_h(fused)]; K = RoPE(W_k . x), V = W_v . x; pool[slot] = K, V. Position p pairs feature p with the
    token at p + 1 and is rotated and stored at p. Exact, because one layer's K and V need no attention.

    Args:
        features: [N, C*Ht], the drafter's chunks in its own order; dtype of the weights.
        next_tokens: [N] int64, the token at position + 1.
        positions, cache_slots, rope_table: as in `dflash_catch_up`.
        weights: `Eagle3Weights`.
        pools: `KVPools` of one layer, written in place.

    Returns:
        fused, [N, H] in the dtype of ``features``: a chain starts from its row at the last position.

    Raises:
        ValueError: the weights, table or pools do not fit each other, or the pools have several layers.

    Grid: prologue (N), both norms and the concatenation; epilogue (N, 1).
    Numerics, fallback: as in `dflash_catch_up`.
    Compared: SGLang runs the whole layer (queries, attention, MLP, norm) over these rows in its draft-extend
    pass; torch or FlashInfer would take an embedding gather, two norms and a concatenation, four launches and
    two more round trips of [N, H], for what the prologue does in one. Upstream has no such pass for EAGLE-3.
    Source: EAGLE-3, arXiv 2503.01840; KV-only Prefill, WhiFlash, arXiv 2606.07710.
    """
    _check(features, positions, cache_slots, weights, rope_table, pools)
    fused = eagle3_fuse(features, weights)
    kv = linear(layer_input(fused, next_tokens, weights), weights.kv, weights.kv_bias)
    write_kv(kv, weights.k_norm, weights.eps, positions, cache_slots, rope_table, pools)
    return fused


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm over the last dimension, in float32 and rounded once to ``x``'s dtype; on a GPU torch's RMSNorm,
    which also rounds the weight."""
    if weight.ndim == 1 and backend_for(x) == "triton":
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


@op()
def layer_input(fused: Tensor, next_tokens: Tensor, weights: Eagle3Weights) -> Tensor:
    """Return the layer's input [RMSNorm(next token's embedding) | RMSNorm(fused)], [N, 2H] in ``fused``'s dtype."""
    embedded = rms_norm(F.embedding(next_tokens, weights.embedding), weights.input_norm, weights.eps)
    return torch.cat([embedded, rms_norm(fused, weights.hidden_norm, weights.eps)], dim=-1)


@op()
def write_kv(
    kv: Tensor,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cache_slots: Tensor,
    rope_table: Tensor,
    pools: KVPools,
) -> None:
    """Apply RMSNorm and RoPE to K, and scatter K and V of ``kv`` ``[N, L*2*Hkv*D]`` into the pools."""
    layers, (_, heads, dim) = len(pools.k), pools.k[0].shape
    if cache_slots.numel() and int(cache_slots.min()) < 0:
        keep = cache_slots >= 0
        kv, positions, cache_slots = kv[keep], positions[keep], cache_slots[keep]
    kv = kv.view(-1, layers, 2, heads, dim)
    k = kv[:, :, 0].float()
    if k_norm is not None:
        k = k * torch.rsqrt(k.square().mean(dim=-1, keepdim=True) + eps) * k_norm.float()[:, None]
    half = rope_table.shape[1] // 2
    cos, sin = rope_table[positions].float()[:, None, None].chunk(2, dim=-1)
    first, second = k[..., :half], k[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < dim:
        parts.append(k[..., 2 * half :])
    k, v = (rounded(each, pools.k[0].dtype) for each in (torch.cat(parts, dim=-1), kv[:, :, 1]))
    for layer, (k_pool, v_pool) in enumerate(zip(pools.k, pools.v, strict=True)):
        k_pool[cache_slots] = k[:, layer]
        v_pool[cache_slots] = v[:, layer]


def eagle3_fuse(features: Tensor, weights: Eagle3Weights) -> Tensor:
    """Return ``fc`` of the concatenated features, after the checkpoint's optional norms: [N, H]."""
    if weights.concat_norm is not None:
        features = rms_norm(features, weights.concat_norm, weights.eps)
    if weights.chunk_norms is not None:
        chunks = features.reshape(-1, *weights.chunk_norms.shape)
        features = rms_norm(chunks, weights.chunk_norms, weights.eps).flatten(1)
    return linear(features, weights.fc, weights.fc_bias)

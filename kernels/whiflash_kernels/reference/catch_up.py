"""KV-only catch-up in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.packed import linear
from whiflash_kernels.structs import DFlashWeights, Eagle3Weights, KVPools


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in float32 and rounded once to ``x``'s dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def write_kv(
    kv: Tensor,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cache_slots: Tensor,
    rope_table: Tensor,
    pools: KVPools,
) -> None:
    """Norm and rotate K, and scatter K and V of ``kv`` ``[N, L*2*Hkv*D]`` into the pools."""
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
    k = torch.cat(parts, dim=-1).to(pools.k[0].dtype)
    v = kv[:, :, 1].to(pools.v[0].dtype)
    for layer, (k_pool, v_pool) in enumerate(zip(pools.k, pools.v, strict=True)):
        k_pool[cache_slots] = k[:, layer]
        v_pool[cache_slots] = v[:, layer]


def dflash_catch_up(
    features: Tensor,
    positions: Tensor,
    cache_slots: Tensor,
    weights: DFlashWeights,
    rope_table: Tensor,
    pools: KVPools,
) -> Tensor:
    """See `whiflash_kernels.catch_up.dflash_catch_up`."""
    fused = rms_norm(linear(features, weights.fc, weights.fc_bias), weights.hidden_norm, weights.eps)
    kv = linear(fused, weights.kv, weights.kv_bias)
    write_kv(kv, weights.k_norm, weights.eps, positions, cache_slots, rope_table, pools)
    return fused


def eagle3_fuse(features: Tensor, weights: Eagle3Weights) -> Tensor:
    """``fc`` of the concatenated features, after the checkpoint's optional norms: [N, H]."""
    if weights.concat_norm is not None:
        features = rms_norm(features, weights.concat_norm, weights.eps)
    if weights.chunk_norms is not None:
        chunks = features.reshape(-1, *weights.chunk_norms.shape)
        features = rms_norm(chunks, weights.chunk_norms, weights.eps).flatten(1)
    return linear(features, weights.fc, weights.fc_bias)


def eagle3_catch_up(
    features: Tensor,
    next_tokens: Tensor,
    positions: Tensor,
    cache_slots: Tensor,
    weights: Eagle3Weights,
    rope_table: Tensor,
    pools: KVPools,
) -> Tensor:
    """See `whiflash_kernels.catch_up.eagle3_catch_up`."""
    fused = eagle3_fuse(features, weights)
    embedded = rms_norm(F.embedding(next_tokens, weights.embedding), weights.input_norm, weights.eps)
    layer_input = torch.cat([embedded, rms_norm(fused, weights.hidden_norm, weights.eps)], dim=-1)
    kv = linear(layer_input, weights.kv, weights.kv_bias)
    write_kv(kv, weights.k_norm, weights.eps, positions, cache_slots, rope_table, pools)
    return fused

"""SGLang's fused K/V materialisation for DFlash, driven with the same weights and pools as ours."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from measure import Call
from sglang.kernels.ops.kvcache.kvcache import can_use_store_cache, store_cache
from sglang.kernels.ops.speculative.fused_kv_materialize import FusedKVMaterializeHelper
from shapes import ModelShape


def materialise(shape: ModelShape, arguments: tuple) -> Call:
    """Return a call of SGLang's materialisation: fc, hidden norm, the helper's kernel, a pool write for each layer."""
    features, positions, slots, weights, rope, pools = arguments
    kv_size = shape.kv_heads * shape.dim
    rotary = SimpleNamespace(rotary_dim=shape.dim, is_neox_style=True, cos_sin_cache=rope)
    layers = [
        SimpleNamespace(
            self_attn=SimpleNamespace(
                num_kv_heads=shape.kv_heads,
                head_dim=shape.dim,
                rotary_emb=rotary,
                qkv_proj=SimpleNamespace(weight=weight),
                q_size=0,
                kv_size=kv_size,
                k_norm=SimpleNamespace(weight=norm, variance_epsilon=weights.eps),
            )
        )
        for weight, norm in zip(weights.kv.split(2 * kv_size), weights.k_norm, strict=True)
    ]
    helper = FusedKVMaterializeHelper(
        layers, rotary, shape.kv_heads, shape.dim, features.device, max_position_hint=rope.shape[0]
    )
    compiled_store = can_use_store_cache(kv_size * features.element_size())

    def write(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        k_pool, v_pool = pools.k[layer], pools.v[layer]
        if compiled_store:
            store_cache(k.flatten(1), v.flatten(1), k_pool.flatten(1), v_pool.flatten(1), slots)
        else:  # what the pool does where its CUDA kernel cannot be built
            k_pool[slots], v_pool[slots] = k, v

    def call() -> None:
        fused = F.rms_norm(F.linear(features, weights.fc), weights.hidden_norm.shape, weights.hidden_norm, weights.eps)
        helper.materialize(fused, positions, write)

    return call

"""Paged KV of one drafter, at the target's own slots, so that one slot table serves target and drafters."""

import torch
from whiflash_kernels import KVPools


class DraftKV:
    """K and V of every draft layer, `[layers, slots, Hkv, D]` each.

    The slots are the target's: whoever owns a target slot owns the drafter's entry beside it. `pools` are the
    same tensors layer by layer, as the catch-up kernels take them.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (layers, slots, kv_heads, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.pools = KVPools(self.k.unbind(0), self.v.unbind(0))

    @staticmethod
    def bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * layers * kv_heads * head_dim * dtype.itemsize

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k, v `[N, Hkv, D]` of one layer at `slots` [N] int64."""
        self.k[layer].index_copy_(0, slots, k.to(self.k.dtype))
        self.v[layer].index_copy_(0, slots, v.to(self.v.dtype))

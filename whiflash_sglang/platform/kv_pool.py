"""The KV pool on the CPU."""

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


class CpuKVPool(MHATokenToKVPool):
    """SGLang's multi-head pool, with torch copies in place of its Triton ones.

    Layout (upstream's): one ``[size + page_size, Hkv, D]`` tensor for K and one for V per layer, contiguous.
    """

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None

    def _store_kv_layer(
        self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor
    ) -> None:
        # index_copy_ skips the broadcasting machinery of `cache[loc] = rows`.
        k_buffer, v_buffer = self.k_buffer[layer_idx], self.v_buffer[layer_idx]
        k_buffer.index_copy_(0, loc, cache_k.view(-1, *k_buffer.shape[1:]))
        v_buffer.index_copy_(0, loc, cache_v.view(-1, *v_buffer.shape[1:]))

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Copy the entries of slots ``src_loc`` to ``tgt_loc`` ([n] int64 each) in every layer."""
        if tgt_loc.numel() == 0:
            return
        for buffer in (*self.k_buffer, *self.v_buffer):
            buffer.index_copy_(0, tgt_loc, buffer.index_select(0, src_loc))

"""Attention of captured verifications on a CPU: everything that a replay needs lies at addresses that stay.

Every row attends to its request's whole row of the table under a mask, so that no shape depends on a length: slow, and
small enough to see that it is right. Eager forwards stay with the platform's own backend.
"""

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc


class CapturedAttention(AttentionBackend):
    """Plans a verification from device tensors alone, before its graph (`_out_graph`) and in it (`_in_graph`)."""

    supports_ragged_verify_graph = True

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self._table, self._pool = runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool
        self._context = int(runner.model_config.context_len)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.rows = torch.zeros(max_bs, dtype=torch.int64)
        self.starts = torch.zeros(max_bs, dtype=torch.int64)
        self.offsets = torch.zeros(max_bs + 1, dtype=torch.int64)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        raise AssertionError("eager forwards have the platform's attention")

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        bs = forward_batch.batch_size
        layout = forward_batch.spec_info.ragged_verify_layout.padded_to_bucket(padded_bs=bs)
        self.rows[:bs].copy_(forward_batch.req_pool_indices)
        self.starts[:bs].copy_(forward_batch.seq_lens)
        self.offsets[: bs + 1].copy_(layout.qo_indptr_device)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        bs, rows = forward_batch.batch_size, torch.arange(forward_batch.positions.numel())
        owner = torch.searchsorted(self.offsets[1 : bs + 1], rows, right=True)
        last = self.starts[owner] + rows - self.offsets[owner]
        self._slots = self._table[self.rows[owner], : self._context].long()
        self._hidden = torch.arange(self._context) > last[:, None]

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        self._pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        heads, group = layer.tp_q_head_num, layer.tp_q_head_num // layer.tp_k_head_num
        keys, values = (
            pool[self._slots].repeat_interleave(group, dim=2, output_size=heads)
            for pool in (self._pool.get_key_buffer(layer.layer_id), self._pool.get_value_buffer(layer.layer_id))
        )
        query = q.view(-1, heads, layer.qk_head_dim)
        scores = torch.einsum("thd,tnhd->thn", query, keys) * layer.scaling
        weights = scores.masked_fill(self._hidden[:, None], -torch.inf).softmax(-1)
        return torch.einsum("thn,tnhd->thd", weights, values).reshape(q.shape[0], -1)

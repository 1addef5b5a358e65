"""SGLang's FlashInfer attention, ours by inheritance, on a CPU: planned on the host, attended to on a tape.

FlashInfer's wrapper is `tests/paged_wrapper.py`, and a loop lays out indices in the place of SGLang's Triton kernel.
Whatever else a captured verification does with its attention is SGLang's and ours. Eager forwards stay with the
platform's own backend.
"""

from typing import Any
from unittest.mock import patch

import torch
from paged_wrapper import PagedWrapper
from sglang.srt.layers.attention import flashinfer_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache import kv_index_translator

from whiflash_sglang.compat.forward.untried.flashinfer import RaggedFlashInferBackend


class FlashInferOnTape(RaggedFlashInferBackend):
    """With what upstream's constructor makes for a target with full attention, but for what needs a GPU."""

    def __init__(self, runner: Any) -> None:
        AttentionBackend.__init__(self)
        self.prefill_backend, self.num_wrappers, self.dispatch_reason = "fa2", 1, None
        self.skip_prefill = self.use_sliding_window_kv_pool = self.prefill_uses_dequant_workspace = False
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.kv_index_translator = runner.kv_index_translator
        self.kv_cache_quant_method = self.token_to_kv_pool.get_kv_cache_quant_method()
        self.flashinfer_kv_cache_dtype = runner.kv_cache_dtype
        self.max_context_len = int(runner.model_config.context_len)
        self.workspace_buffer = torch.empty(0)
        self._swa_kv_pool = self.prefill_wrapper_ragged = None
        room = runner.req_to_token_pool.size
        self.kv_indptr = [torch.zeros(room + 1, dtype=torch.int32)]
        self.qo_indptr = [torch.zeros(room + 1, dtype=torch.int32)]
        self.kv_last_page_len = torch.ones(room, dtype=torch.int32)
        self.indices_updater_prefill = flashinfer_backend.FlashInferIndicesUpdaterPrefill(runner, self)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        raise AssertionError("eager forwards have the platform's attention")

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        with (
            patch.object(kv_index_translator, "create_flashinfer_kv_indices_triton", LaidOut()),
            patch.object(
                flashinfer_backend, "BatchPrefillWithPagedKVCacheWrapper", PagedWrapper, create=True
            ),
        ):
            super().init_forward_metadata_out_graph(forward_batch, in_capture)

    @property
    def planned(self) -> list[tuple[list[int], list[int]]]:
        """Offsets of rows and of keys, of every plan so far."""
        return [plan for captured in self._captured.values() for plan in captured.prefill_wrappers[0].planned]


class LaidOut:
    """`create_flashinfer_kv_indices_triton`, as it is launched."""

    def __getitem__(self, grid: Any) -> "LaidOut":
        return self

    def __call__(
        self,
        table: torch.Tensor,
        rows: torch.Tensor,
        lengths: torch.Tensor,
        offsets: torch.Tensor,
        starts: torch.Tensor | None,
        out: torch.Tensor,
        *_: Any,
        **named: Any,
    ) -> None:
        assert starts is None
        for row, length, offset in zip(rows.tolist(), lengths.tolist(), offsets.tolist(), strict=False):
            out[offset : offset + length] = table[row, :length]

"""SGLang's FlashInfer attention for captured verifications whose requests have different widths.

FlashInfer plans a forward on the host, outside its graph: which queries meet which keys in which block of threads. What
a graph keeps of the plan at its capture (how many blocks, where each part of the plan is) depends on the number of
rows and of requests alone (`PrefillPlan` and `MLAPlan` in FlashInfer's `scheduler.cuh`: "the lengths of sequences
determined by qo_indptr_h can vary"), so each replay may have widths of its own: it is planned again before it, into the
memory that the graph reads. SGLang does so for latent attention; its other backend takes one width only
(`FlashInferAttnBackend.init_forward_metadata_out_graph` raises for a layout).

To plan, the host reads how many rows each request has, so it waits for the drafts once in a round, graph or not.
"""

from typing import Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend, PrefillMetadata
from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend
from sglang.srt.speculative.ragged_verify import resolve_ragged_verify_layout


def backend_of(runner: Any) -> Any:
    """The backend of a server of ours, as SGLang's registry makes upstream's."""
    if runner.use_mla_backend:
        return RaggedFlashInferMLABackend(runner)
    return RaggedFlashInferBackend(runner, init_new_workspace=runner.init_new_workspace)


class RaggedFlashInferBackend(FlashInferAttnBackend):  # type: ignore[misc]
    """`FlashInferAttnBackend`, which plans a replay by its `RaggedVerifyLayout`, as an eager verification."""

    supports_ragged_verify_graph = True

    def init_cuda_graph_state(
        self, max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None
    ) -> None:
        """Allocate what captured verifications of up to `max_bs` requests read.

        Upstream has room for as many requests as the server takes, but some here are none; its indices of K and V are
        sized by rows, one whole context each, where a verification reads one for a request; and no mask is used.
        """
        device = self.workspace_buffer.device

        def ints(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        self.kv_indptr, self.cuda_graph_qo_indptr = [ints(max_bs + 1)], [ints(max_bs + 1)]
        self.kv_last_page_len = ints(max_bs) + 1
        self.indices_updater_prefill.kv_last_page_len = self.kv_last_page_len
        indices = ints(max_bs * self.max_context_len) if kv_indices_buf is None else kv_indices_buf
        self.cuda_graph_kv_indices = [indices]
        self._captured: dict[int, PrefillMetadata] = {}

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan a verification that is captured, or replayed next. Waits for the device, whose widths it reads."""
        layout = resolve_ragged_verify_layout(forward_batch)
        if layout is None:
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
            return
        requests, rows = forward_batch.batch_size, layout.graph_num_tokens
        if in_capture:
            self._captured[rows] = self._metadata_of(requests)
        self.forward_metadata = self._captured[rows]
        self.indices_updater_prefill.update(
            forward_batch.req_pool_indices[:requests],
            forward_batch.seq_lens[:requests],
            None,
            forward_batch.seq_lens_sum,
            prefix_lens=None,
            prefill_wrappers=self.forward_metadata.prefill_wrappers,
            use_ragged=False,
            encoder_lens=None,
            spec_info=forward_batch.spec_info,
            plan=forward_batch.kv_loc_plan,
        )

    def _metadata_of(self, requests: int) -> PrefillMetadata:
        """A wrapper of FlashInfer's for one more graph, which plans into the memory of the first."""
        wrappers = self._create_prefill_wrappers(requests)
        for captured in self._captured.values():
            # 8 MiB, and as much pinned. Every replay is planned right before it, so no two plans are needed at once;
            # and planning reads lengths first, so what the last plan sent is there before it is written over.
            [first], [wrapper] = captured.prefill_wrappers, wrappers
            wrapper._int_workspace_buffer = first._int_workspace_buffer
            wrapper._pin_memory_int_workspace_buffer = first._pin_memory_int_workspace_buffer
            break
        return PrefillMetadata(wrappers, use_ragged=False, extend_no_prefix=False)


class RaggedFlashInferMLABackend(FlashInferMLAAttnBackend):  # type: ignore[misc]
    """`FlashInferMLAAttnBackend`, with room for graphs' requests that are none."""

    def init_cuda_graph_state(
        self, max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None
    ) -> None:
        """Allocate what captured verifications of up to `max_bs` requests read."""
        indices = kv_indices_buf
        if indices is None:
            indices = torch.zeros(max_bs * self.max_context_len, dtype=torch.int32, device=self.device)
        super().init_cuda_graph_state(max_bs, max_num_tokens, indices)
        for name in ("cuda_graph_qo_indptr", "cuda_graph_kv_indptr"):
            setattr(self, name, torch.zeros(max_bs + 1, dtype=torch.int32, device=self.device))
        for name in ("qo_indptr", "kv_indptr", "kv_len_arr"):
            pinned = getattr(self, f"fast_plan_{name}_cpu")
            room = pinned.new_zeros(max_bs + 1, pin_memory=pinned.is_pinned())
            setattr(self, f"fast_plan_{name}_cpu", room)

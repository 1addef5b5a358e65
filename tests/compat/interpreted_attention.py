"""Batches of verifications for SGLang's attention backends, and what their graphs are captured with.

Taken in a child process (`test_attention.py`): Triton's interpreter must be chosen before Triton is first imported, and
`sgl_kernel`, which does not load without CUDA, is a stand-in here.

Each backend is SGLang's own class, built without its constructor, which wants a GPU: it has the attributes that its
`init_forward_metadata` reads, as the constructor sets them for a target with full attention. The Triton kernels that
fill its indices run under the interpreter.
This proves which rows, lengths and slots a backend hands to its kernels. It does not prove that the kernels, compiled,
do with them what they should, nor that a backend starts: no GPU has run any of this.
"""

# ruff: noqa: E402

import sys
from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class _NotLoaded(ModuleType):
    """Any function of a module that does not load; none is called here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


sys.modules["sgl_kernel"] = _NotLoaded("sgl_kernel")

from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from transformers import PretrainedConfig
from whiflash_kernels import prepare_mixed_block

from whiflash_sglang.device.capture import graded
from whiflash_sglang.engine.forward.graphs import VerifyGraphs, spare_slots
from whiflash_sglang.engine.forward.target import verify_input

CONFIGURED = 17
"""`speculative_num_draft_tokens` of a server with lookup: its widest block."""
REQUESTS = 4
CONTEXT = 64
MOST = REQUESTS + spare_slots(REQUESTS, CONFIGURED)
"""Slots of a graph."""
STARTS, ROWS = [5, 2, 9], [2, 0, 3]
FULL_ATTENTION = SimpleNamespace(hf_config=PretrainedConfig(), is_draft_model=False, linear_attn_registry_result=None)
"""SGLang's configuration of a target, as far as it says what its layers are."""
WIDTHS = {"uniform": [3, 3, 3], "ragged": [3, 1, 5], "alone": [4], "plain": [1, 1, 1]}


class Verification:
    """A batch of requests with `widths` rows each behind `starts` tokens, as the runner hands it to a backend; slots
    come in pages. kv: a pool with other slots for windowed layers."""

    def __init__(
        self,
        widths: list[int],
        bucket: int | None = None,
        page: int = 1,
        starts: Sequence[int] = STARTS,
        kv: Any = None,
    ) -> None:
        self.widths, self.starts, rows = widths, [*starts[: len(widths)]], ROWS[: len(widths)]
        order = torch.randperm(4 * CONTEXT // page, generator=torch.Generator().manual_seed(0))
        slots = order[:, None] * page + torch.arange(page)
        self.table = slots.view(4, CONTEXT).to(torch.int32)
        self.pool = SimpleNamespace(req_to_token=self.table, size=4)
        self.rows, starts = torch.tensor(rows), torch.tensor(self.starts)
        drafts = torch.ones(len(widths), max(widths) - 1, dtype=torch.int64)
        bonus = torch.ones(len(widths), dtype=torch.int64)
        self.lens = torch.tensor(widths, dtype=torch.int32)
        self.block = prepare_mixed_block(
            bonus, drafts, self.lens, starts, self.rows, self.table, rows=bucket or sum(widths)
        )
        self.translator = KVIndexTranslator(
            req_to_token=self.table, token_to_kv_pool_allocator=None, token_to_kv_pool=kv, page_size=page, device="cpu"
        )
        self.batch = SimpleNamespace(
            batch_size=len(widths),
            forward_mode=ForwardMode.TARGET_VERIFY,
            input_ids=self.block.input_ids,
            positions=self.block.positions,
            out_cache_loc=self.block.cache_slots,
            req_pool_indices=self.rows,
            seq_lens=starts,
            seq_lens_cpu=starts,
            seq_lens_sum=int(starts.sum()),
            encoder_lens=None,
            extend_seq_lens_cpu=None,
            spec_info=verify_input(self.block, self.lens, max(widths)),
        )
        self.batch.kv_loc_plan = self.translator.own_plan(self.batch)

    def backend(self, cls: type, **attributes: Any) -> Any:
        """`cls` without its constructor, and what all backends keep."""
        backend = object.__new__(cls)
        backend.__dict__.update(
            req_to_token_pool=self.pool,
            req_to_token=self.table,
            kv_index_translator=self.translator,
            token_to_kv_pool=None,
            use_sliding_window_kv_pool=False,
            sliding_window_size=None,
            max_context_len=CONTEXT,
            page_size=1,
            device="cpu",
            topk=1,
            _kv_shard_pool=None,
            is_draft_runner=True,
            skip_prefill=False,
            **attributes,
        )
        return backend

    @property
    def offsets(self) -> list[int]:
        return [0, *accumulate(self.widths)]


def graphs_of(buckets: list[int], attention: str = "other") -> Any:
    """Our runner as it captures, for what it says of a capture."""
    graphs = object.__new__(VerifyGraphs)
    graphs.__dict__.update(
        widest=CONFIGURED,
        max_bs=MOST,
        capture_num_tokens=buckets,
        device="cpu",
        buffers=SimpleNamespace(
            req_pool_indices=torch.zeros(MOST, dtype=torch.int64), seq_lens=torch.ones(MOST, dtype=torch.int64)
        ),
        seq_len_fill_value=1,
        model_runner=SimpleNamespace(
            prefill_attention_backend_str=attention, decode_attention_backend_str=attention, model_config=FULL_ATTENTION
        ),
        _captured_ragged_layouts={},
    )
    return graphs


def captured(case: Verification, backend: Any) -> Any:
    """A plan that a backend's kernels are captured with, filled for a replay of `case`: one metadata, filled twice."""
    buckets = graded(REQUESTS * CONFIGURED)
    bucket = int(case.block.positions.shape[0])
    assert bucket in buckets
    slots = min(bucket, MOST)
    backend.init_cuda_graph_state(MOST, buckets[-1])

    def view(spec_info: Any, rows: torch.Tensor, starts: torch.Tensor) -> Any:
        batch = SimpleNamespace(**vars(case.batch))
        batch.batch_size, batch.spec_info = slots, spec_info
        batch.req_pool_indices = torch.zeros(slots, dtype=torch.int64)
        batch.seq_lens = batch.seq_lens_cpu = torch.ones(slots, dtype=torch.int64)
        batch.req_pool_indices[: len(rows)], batch.seq_lens[: len(rows)] = rows, starts
        batch.seq_lens_sum = int(batch.seq_lens.sum())
        batch.kv_loc_plan = case.translator.own_plan(batch)
        return batch

    graphs = graphs_of(buckets)
    nothing = torch.zeros(0, dtype=torch.int64)
    backend.init_forward_metadata_out_graph(view(graphs.get_spec_info(bucket), nothing, nothing), in_capture=True)
    metadata = backend.forward_metadata
    planned = "cache_seqlens_int32 cu_seqlens_q cu_seqlens_k page_table qo_indptr kv_indptr"
    for name in f"{planned} window_kv_indptr window_kv_indices window_kv_offsets".split():
        if getattr(metadata, name, None) is not None:
            getattr(metadata, name)[1:].fill_(-1)
    replay = view(case.batch.spec_info, case.rows, case.batch.seq_lens)
    backend.init_forward_metadata_out_graph(replay)
    assert backend.forward_metadata is metadata
    return metadata

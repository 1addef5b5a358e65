"""What SGLang's attention backends plan for our verifications, and its extend kernel on that plan.

Run by `test_attention.py` in a child process: Triton's interpreter must be chosen before Triton is first imported, and
`sgl_kernel`, which does not load without CUDA, is a stand-in here.

Each backend is SGLang's own class, built without its constructor, which wants a GPU: it has the attributes that its
`init_forward_metadata` reads, as the constructor sets them for a target with full attention. The Triton kernels that
fill its indices run under the interpreter; FlashInfer's wrappers are replaced by some that keep what they are told to
plan, those for graphs in the buffers that graphs read.
This proves which rows, lengths and slots a backend hands to its kernels. It does not prove that the kernels, compiled,
do with them what they should, nor that a backend starts: no GPU has run any of this.
"""

# ruff: noqa: E402

import sys
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch


class _NotLoaded(ModuleType):
    """Any function of a module that does not load; none is called here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


sys.modules["sgl_kernel"] = _NotLoaded("sgl_kernel")

from paged_wrapper import PagedWrapper
from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
from sglang.srt.layers.attention import flashinfer_backend, flashinfer_mla_backend
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from sglang.srt.layers.attention.flashinfer_backend import (
    FlashInferAttnBackend,
    FlashInferIndicesUpdaterPrefill,
)
from sglang.srt.layers.attention.flashinfer_mla_backend import (
    FlashInferMLAAttnBackend,
    FlashInferMLAIndicesUpdaterPrefill,
)
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.attention.trtllm_mha_backend import TRTLLMHAAttnBackend
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from transformers import PretrainedConfig
from whiflash_kernels import prepare_mixed_block

from whiflash_sglang.compat.forward.graphs import VerifyGraphs, row_buckets, spare_slots
from whiflash_sglang.compat.forward.target import verify_input
from whiflash_sglang.compat.forward.triton_backend import RaggedTritonBackend
from whiflash_sglang.compat.forward.untried.flashinfer import (
    RaggedFlashInferBackend,
    RaggedFlashInferMLABackend,
)

CONFIGURED = 17
"""`speculative_num_draft_tokens` of a server with lookup: its widest block."""
REQUESTS = 4
CONTEXT = 64
STARTS, ROWS = [5, 2, 9], [2, 0, 3]
FULL_ATTENTION = SimpleNamespace(
    hf_config=PretrainedConfig(), is_draft_model=False, linear_attn_registry_result=None
)
"""SGLang's configuration of a target, as far as it says what its layers are."""
WIDTHS = {"uniform": [3, 3, 3], "ragged": [3, 1, 5], "alone": [4], "plain": [1, 1, 1]}


class Plan(NamedTuple):
    """Of a verification: query rows as offsets, and per request the entries of K and V that are read, in order."""

    rows: list[int]
    slots: list[list[int]]
    widest: int


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
            req_to_token=self.table,
            token_to_kv_pool_allocator=None,
            token_to_kv_pool=kv,
            page_size=page,
            device="cpu",
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
            spec_info=verify_input(self.block, self.lens, widths, max(widths)),
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
            **attributes,
        )
        return backend

    def read(self, lengths: list[int]) -> list[list[int]]:
        """The slots of each request's first `lengths` positions."""
        return [self.table[row, :n].tolist() for row, n in zip(self.rows.tolist(), lengths, strict=True)]

    @property
    def offsets(self) -> list[int]:
        return [0, *accumulate(self.widths)]

    @property
    def ends(self) -> list[int]:
        return [n + m for n, m in zip(self.starts, self.widths, strict=True)]


def cut(flat: torch.Tensor, offsets: torch.Tensor) -> list[list[int]]:
    return [flat[a:b].tolist() for a, b in pairwise(offsets.tolist())]


def triton_backend(case: Verification, cls: type) -> Any:
    """With upstream's room: for the server's requests, of which a graph has slots besides."""
    most = REQUESTS + 1
    return case.backend(
        cls,
        dllm_attention=None,
        dcp_size=1,
        target_verify_num_tokens_per_req=CONFIGURED,
        num_draft_tokens=CONFIGURED,
        kv_indptr=torch.zeros(most, dtype=torch.int32),
        qo_indptr=torch.zeros(most, dtype=torch.int64),
        mask_indptr=torch.zeros(most, dtype=torch.int64),
        window_kv_indptr=None,
        num_head=4,
        v_head_dim=16,
        swa_v_head_dim=None,
        max_kv_splits=1,
        lean_total_programs=1,
        lean_block_m=1,
        is_draft_runner=True,
        skip_prefill=False,
    )


def triton_metadata(case: Verification, cls: type = RaggedTritonBackend) -> Any:
    backend = triton_backend(case, cls)
    backend.init_forward_metadata(case.batch)
    return backend.forward_metadata


def triton(case: Verification, cls: type = RaggedTritonBackend) -> Plan:
    """Reads the prefix; K and V of the rows themselves are handed to the kernel."""
    planned = triton_metadata(case, cls)
    return Plan(
        planned.qo_indptr.tolist(), cut(planned.kv_indices, planned.kv_indptr), planned.max_extend_len
    )


def fa3_backend(case: Verification, version: int = 3) -> Any:
    return case.backend(
        FlashAttentionBackend,
        speculative_num_draft_tokens=CONFIGURED,
        local_attn_builder=None,
        is_prefill_aware_swa=False,
        is_encoder_decoder=False,
        has_swa=False,
        fa_impl_ver=version,
        max_num_pages=CONTEXT,
        needs_cpu_seq_lens=False,
        use_mla=False,
        _get_scheduler_metadata=None,
        decode_cuda_graph_metadata={},
        attn_cp_size=1,
        is_draft_runner=True,
        skip_prefill=False,
    )


def fa3(case: Verification, version: int = 3) -> Plan:
    backend = fa3_backend(case, version)
    backend.init_forward_metadata(case.batch)
    planned = backend.forward_metadata
    lengths = planned.cache_seqlens_int32.tolist()
    slots = [row[:n].tolist() for row, n in zip(planned.page_table, lengths, strict=True)]
    assert planned.cu_seqlens_k.tolist() == [0, *accumulate(lengths)]
    assert planned.max_seq_len_k >= max(lengths)
    return Plan(planned.cu_seqlens_q.tolist(), slots, planned.max_seq_len_q)


def fa4(case: Verification) -> Plan:
    return fa3(case, 4)


def trtllm_mha_backend(case: Verification) -> Any:
    return case.backend(
        TRTLLMHAAttnBackend,
        speculative_num_draft_tokens=CONFIGURED,
        is_xqa_impl=False,
        max_num_pages=CONTEXT,
        _swa_kv_pool=None,
        attn_cp_size=1,
        expand_encoder_only_verify=False,
        is_draft_runner=True,
        skip_prefill=False,
    )


def trtllm_mha(case: Verification) -> Plan:
    backend = trtllm_mha_backend(case)
    backend.init_forward_metadata(case.batch)
    planned = backend.forward_metadata
    lengths = planned.cache_seqlens_int32.tolist()
    slots = [row[:n].tolist() for row, n in zip(planned.page_table, lengths, strict=True)]
    return Plan(planned.cu_seqlens_q.tolist(), slots, planned.max_seq_len_q)


class Wrapper:
    """FlashInfer's wrapper, which keeps what it is told to plan."""

    is_cuda_graph_enabled = False

    def begin_forward(self, qo_indptr: Any, kv_indptr: Any, kv_indices: Any, *_: Any, **__: Any) -> None:
        self.rows, self.slots = qo_indptr.tolist(), cut(kv_indices, kv_indptr)

    plan = begin_forward


def flashinfer_backend_of(case: Verification, cls: type = RaggedFlashInferBackend) -> Any:
    backend = case.backend(
        cls,
        prefill_wrappers_verify=[Wrapper()],
        kv_last_page_len=torch.ones(REQUESTS),
        num_wrappers=1,
        prefill_backend="fa2",
        workspace_buffer=torch.empty(0),
    )
    updater = object.__new__(FlashInferIndicesUpdaterPrefill)
    updater.__dict__.update(
        attn_backend=backend,
        prefill_wrapper_ragged=None,
        kv_indptr=[None],
        qo_indptr=[None],
        kv_last_page_len=backend.kv_last_page_len,
        num_qo_heads=2,
        num_kv_heads=1,
        head_dim=16,
        q_data_type=torch.float32,
        data_type=torch.float32,
    )
    updater.update = updater.update_single_wrapper
    backend.indices_updater_prefill = updater
    return backend


def flashinfer(case: Verification) -> Plan:
    backend = flashinfer_backend_of(case)
    backend.init_forward_metadata(case.batch)
    [wrapper] = backend.prefill_wrappers_verify
    return Plan(wrapper.rows, wrapper.slots, max(case.widths))


def flashinfer_mla_backend_of(case: Verification, cls: type = RaggedFlashInferMLABackend) -> Any:
    """With upstream's room: for the server's requests."""
    offsets = torch.zeros(REQUESTS + 1, dtype=torch.int32)
    backend = case.backend(
        cls,
        prefill_wrapper_verify=Wrapper(),
        workspace_buffer=torch.empty(0),
        kv_indptr=offsets,
        q_indptr_decode=offsets,
        fast_plan_qo_indptr_cpu=offsets.clone(),
        fast_plan_kv_indptr_cpu=offsets.clone(),
        fast_plan_kv_len_arr_cpu=offsets[1:].clone(),
        prefill_cuda_graph_metadata={},
    )
    updater = object.__new__(FlashInferMLAIndicesUpdaterPrefill)
    updater.__dict__.update(
        attn_backend=backend,
        prefill_wrapper_ragged=None,
        kv_indptr=None,
        qo_indptr=None,
        scaling=1.0,
        num_local_heads=2,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        q_data_type=torch.float32,
        data_type=torch.float32,
    )
    backend.indices_updater_prefill = updater
    return backend


def flashinfer_mla(case: Verification) -> Plan:
    backend = flashinfer_mla_backend_of(case)
    backend.init_forward_metadata(case.batch)
    wrapper = backend.prefill_wrapper_verify
    return Plan(wrapper.rows, wrapper.slots, max(case.widths))


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("plan", [fa3, fa4, trtllm_mha, flashinfer, flashinfer_mla])
def test_backends_that_read_every_row_from_the_pool(plan: Callable[..., Plan], widths: list[int]) -> None:
    case = Verification(widths)
    assert plan(case) == Plan(case.offsets, case.read(case.ends), max(widths))


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_triton_reads_the_prefix_from_the_pool(widths: list[int]) -> None:
    case = Verification(widths)
    assert triton(case) == Plan(case.offsets, case.read(case.starts), max(widths))


def test_what_is_refused_plans_other_rows() -> None:
    """Upstream's own Triton gives every request the widest one's rows, and its graphs no room to spare requests."""
    case = Verification(WIDTHS["ragged"])
    assert triton(case, TritonAttnBackend).rows != case.offsets
    padded = Verification(WIDTHS["ragged"], 12)
    with pytest.raises(RuntimeError, match="size"):
        captured(padded, triton_backend(padded, TritonAttnBackend))
    # Upstream's FlashInfer captures one width, and its latent attention has no room for requests that are none.
    with pytest.raises(NotImplementedError, match="ragged verify"):
        flashinfer_backend_of(padded, FlashInferAttnBackend).init_forward_metadata_out_graph(padded.batch)
    with pytest.raises(RuntimeError, match="size"):
        captured(padded, flashinfer_mla_backend_of(padded, UpstreamsRoom))
    # XQA (Hopper, SM120) takes no layout at all, of whatever widths.
    with pytest.raises(NotImplementedError, match="xqa"):
        case.backend(TRTLLMHAAttnBackend, is_xqa_impl=True).init_forward_metadata(case.batch)


def graphs_of(buckets: list[int], attention: str = "other") -> Any:
    """Our runner as it captures, for what it says of a capture."""
    graphs = object.__new__(VerifyGraphs)
    graphs.__dict__.update(
        widest=CONFIGURED,
        max_bs=REQUESTS + spare_slots(REQUESTS, CONFIGURED),
        capture_num_tokens=buckets,
        device="cpu",
        model_runner=SimpleNamespace(
            prefill_attention_backend_str=attention,
            decode_attention_backend_str=attention,
            model_config=FULL_ATTENTION,
        ),
        _captured_ragged_layouts={},
    )
    return graphs


def captured(case: Verification, backend: Any) -> Any:
    """What a backend's kernels were captured with, and hold before a replay of `case`: one metadata, filled twice."""
    buckets = row_buckets(REQUESTS * CONFIGURED)
    bucket = int(case.block.positions.shape[0])
    assert bucket in buckets
    slots = min(bucket, REQUESTS + spare_slots(REQUESTS, CONFIGURED))
    backend.init_cuda_graph_state(REQUESTS + spare_slots(REQUESTS, CONFIGURED), buckets[-1])

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
    backend.init_forward_metadata_out_graph(
        view(graphs.get_spec_info(bucket), nothing, nothing), in_capture=True
    )
    metadata = backend.forward_metadata
    for name in (
        "cache_seqlens_int32",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "page_table",
        "qo_indptr",
        "kv_indptr",
        "window_kv_indptr",
        "window_kv_indices",
        "window_kv_offsets",
    ):
        if getattr(metadata, name, None) is not None:
            getattr(metadata, name)[1:].fill_(-1)
    replay = view(case.batch.spec_info, case.rows, case.batch.seq_lens)
    backend.init_forward_metadata_out_graph(replay)
    assert backend.forward_metadata is metadata
    return metadata


def captured_triton(case: Verification) -> Plan:
    metadata = captured(case, triton_backend(case, RaggedTritonBackend))
    lengths = [*case.starts, *[1] * (len(metadata.kv_indptr) - 1 - len(case.starts))]
    assert metadata.kv_indptr.tolist() == [0, *accumulate(lengths)]
    slots = cut(metadata.kv_indices, metadata.kv_indptr)
    return Plan(metadata.qo_indptr.tolist(), slots, metadata.max_extend_len)


def captured_fa3(case: Verification) -> Plan:
    return _of_pages(captured(case, fa3_backend(case)))


def captured_fa4(case: Verification) -> Plan:
    return _of_pages(captured(case, fa3_backend(case, 4)))


def captured_trtllm_mha(case: Verification) -> Plan:
    return _of_pages(captured(case, trtllm_mha_backend(case)))


class UpstreamsRoom(RaggedFlashInferMLABackend):
    """For as many requests as the server takes; only the device is not `cuda`."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *_: Any) -> None:
        indices = torch.zeros(max_bs * CONTEXT, dtype=torch.int32)
        FlashInferMLAAttnBackend.init_cuda_graph_state(self, max_bs, max_num_tokens, indices)


class MlaWrapper:
    """FlashInfer's `BatchMLAPagedAttentionWrapper(use_cuda_graph=True)`: graphs read what it is told to plan."""

    def __init__(
        self, workspace: torch.Tensor, *, use_cuda_graph: bool, backend: str, **buffers: Any
    ) -> None:
        assert use_cuda_graph
        self.buffers = buffers

    def plan(self, qo_indptr: Any, kv_indptr: Any, kv_indices: Any, kv_len_arr: Any, *_: Any) -> None:
        for name, own in self.buffers.items():
            told = {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_len_arr": kv_len_arr}.get(
                name, kv_indices
            )
            if name == "kv_indices":
                own = own[: len(told)]
            assert own.shape == told.shape  # as FlashInfer asks of a graph's buffers
            own.copy_(told)

    @property
    def planned(self) -> Plan:
        rows, keys = self.buffers["qo_indptr"], self.buffers["kv_indptr"]
        assert self.buffers["kv_len_arr"].tolist() == keys.diff().tolist()
        return Plan(rows.tolist(), cut(self.buffers["kv_indices"], keys), CONFIGURED)


@pytest.fixture(autouse=True)
def wrappers(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang has FlashInfer's only where there is a GPU."""
    monkeypatch.setattr(
        flashinfer_backend, "BatchPrefillWithPagedKVCacheWrapper", PagedWrapper, raising=False
    )
    monkeypatch.setattr(flashinfer_mla_backend, "BatchMLAPagedAttentionWrapper", MlaWrapper, raising=False)


def captured_flashinfer(case: Verification) -> Plan:
    [wrapper] = captured(case, flashinfer_backend_of(case)).prefill_wrappers
    assert [rows[-1] for rows, _ in wrapper.planned] == [len(case.block.positions)] * 2
    return Plan(wrapper.rows.tolist(), cut(wrapper.indices, wrapper.keys), CONFIGURED)


def captured_flashinfer_mla(case: Verification) -> Plan:
    wrapper: MlaWrapper = captured(case, flashinfer_mla_backend_of(case)).prefill_wrapper
    return wrapper.planned


def _of_pages(metadata: Any) -> Plan:
    lengths = metadata.cache_seqlens_int32.tolist()
    assert metadata.cu_seqlens_k.tolist() == [0, *accumulate(lengths)]
    slots = [row[:n].tolist() for row, n in zip(metadata.page_table, lengths, strict=True)]
    return Plan(metadata.cu_seqlens_q.tolist(), slots, metadata.max_seq_len_q)


@pytest.mark.parametrize("spare", [0, 1, 3])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize(
    "plan",
    [
        captured_fa3,
        captured_fa4,
        captured_trtllm_mha,
        captured_triton,
        captured_flashinfer,
        captured_flashinfer_mla,
    ],
)
def test_what_a_graph_was_captured_with_fits_every_batch(
    plan: Callable[..., Plan], widths: list[int], spare: int
) -> None:
    """Requests have their rows and their context, as without a graph; the rows behind them have slots of their own."""
    bucket = next(b for b in row_buckets(REQUESTS * CONFIGURED) if b >= sum(widths) + spare)
    case = Verification(widths, bucket)
    found, count = plan(case), len(widths)
    assert found.rows[: count + 1] == case.offsets
    assert found.rows[-1] == bucket
    lengths = case.starts if plan is captured_triton else case.ends
    assert found.slots[:count] == case.read(lengths)
    assert max(b - a for a, b in pairwise(found.rows)) <= found.widest
    assert len(found.slots) > count or bucket == sum(widths)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_sglangs_extend_kernel_attends_as_a_loop_does(widths: list[int]) -> None:
    case, (heads, kv_heads, size) = Verification(widths), (4, 2, 16)
    planned, generator = triton_metadata(case), torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 4 * CONTEXT, kv_heads, size, generator=generator)
    queries = torch.randn(sum(widths), heads, size, generator=generator)
    out, at = torch.full_like(queries, torch.nan), case.block.cache_slots
    extend_attention_fwd(
        queries,
        keys[at],
        values[at],
        out,
        keys,
        values,
        planned.qo_indptr,
        planned.kv_indptr,
        planned.kv_indices,
        planned.custom_mask,
        True,
        planned.mask_indptr,
        planned.max_extend_len,
        1.0,
        1.0,
    )
    for i, position in enumerate(case.block.positions.tolist()):
        seen = case.table[case.rows[case.block.request_of_row[i]], : position + 1].long()
        k, v = (pool[seen].repeat_interleave(heads // kv_heads, 1) for pool in (keys, values))
        weights = torch.einsum("hd,nhd->hn", queries[i], k).div(size**0.5).softmax(-1)
        torch.testing.assert_close(out[i], torch.einsum("hn,nhd->hd", weights, v), atol=1e-4, rtol=1e-4)

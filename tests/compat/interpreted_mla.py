"""SGLang's TRT-LLM backend for latent attention on our verifications, all but its kernel.

Run by `test_attention.py` in a child process, as `interpreted_attention.py`, whose batches it takes. The kernel is a
loop that does what FlashInfer documents of `trtllm_batch_decode_with_kv_cache_mla`: of each request it takes as many
queries as of every other, for the last positions of its keys, and each sees the keys up to its own. Its inputs and
outputs (queries padded by a Triton kernel, pages, lengths, outputs cut again) are upstream's own.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted_attention import CONFIGURED, CONTEXT, FULL_ATTENTION, REQUESTS, WIDTHS, Verification, graphs_of
from sglang.srt.layers.attention import flashinfer_mla_backend, trtllm_mla_backend
from sglang.srt.layers.attention.trtllm_mla_backend import TRTLLMMLABackend
from whiflash_kernels import fill_slots

from whiflash_sglang.device.capture import graded
from whiflash_sglang.engine.forward import recurrent
from whiflash_sglang.engine.forward.recurrent import rows_counted
from whiflash_sglang.engine.forward.target import verify_input

PAGE, HEADS, LATENT, ROPE = 32, 2, 512, 64
SIZE = LATENT + ROPE
LAYER = SimpleNamespace(
    tp_q_head_num=HEADS, tp_k_head_num=1, head_dim=SIZE, v_head_dim=LATENT, layer_id=0, scaling=SIZE**-0.5
)
RUNNER = SimpleNamespace(
    prefill_attention_backend_str="fa4", decode_attention_backend_str="trtllm_mla", model_config=FULL_ATTENTION
)


class Mla(TRTLLMMLABackend):  # type: ignore[misc]
    """SGLang's, with a loop for its kernel."""

    def _run_decode_kernel(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        max_seq_len: int,
        layer: Any,
    ) -> torch.Tensor:
        requests, width = query.shape[:2]
        out = torch.full((requests, width, HEADS, LATENT), torch.nan)
        for i, length in enumerate(seq_lens.tolist()):
            assert width <= length <= max_seq_len
            pages = block_tables[i, : -(-length // PAGE)].long()
            keys = kv_cache[pages, 0].reshape(-1, SIZE)
            for j in range(width):
                out[i, j] = attend(query[i, j], keys[: length - width + j + 1])
        return out


def attend(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    weights = (query @ keys.T * LAYER.scaling).softmax(-1)
    return weights @ keys[:, :LATENT]


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a server with our widest block, without context parallelism or parent's graphs (FlashInfer)."""
    for module in (trtllm_mla_backend, flashinfer_mla_backend):
        monkeypatch.setattr(module, "get_parallel", lambda: SimpleNamespace(dcp_enabled=False))
    monkeypatch.setattr(recurrent, "get_spec", lambda: SimpleNamespace(speculative_num_draft_tokens=CONFIGURED))
    parent = flashinfer_mla_backend.FlashInferMLAAttnBackend
    monkeypatch.setattr(parent, "init_cuda_graph_state", lambda *_: None)


def backend_of(case: Verification, keys: torch.Tensor) -> Any:
    backend = case.backend(
        Mla,
        num_draft_tokens=CONFIGURED,
        data_type=torch.float32,
        q_data_type=torch.float32,
        num_q_heads=HEADS,
        kv_cache_dim=SIZE,
        forward_prefill_metadata=None,
        decode_cuda_graph_metadata={},
        padded_q_buffer=None,
        unpad_output_buffer=None,
    )
    backend.page_size = PAGE
    backend.token_to_kv_pool = SimpleNamespace(get_key_buffer=lambda layer: keys)
    return backend


def content(case: Verification) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of every row, and a pool that holds what no request may read as well."""
    generator = torch.Generator().manual_seed(3)
    rows = int(case.block.positions.shape[0])
    return (torch.randn(rows, HEADS, SIZE, generator=generator), torch.randn(4 * CONTEXT, 1, SIZE, generator=generator))


def expected(case: Verification, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Row by row, of the rows that are requests'."""
    found = []
    for i in range(sum(case.widths)):
        position = int(case.block.positions[i])
        seen = case.table[case.rows[case.block.request_of_row[i]], : position + 1].long()
        found.append(attend(queries[i], keys[seen, 0]))
    return torch.stack(found).flatten(1)


def forward(backend: Any, batch: Any, queries: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = backend.forward_extend(queries, None, None, LAYER, batch, save_kv_cache=False)
    return out


def eager(case: Verification, counted: int) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys = content(case)
    backend = backend_of(case, keys)
    case.batch.spec_info = verify_input(case.block, case.lens, counted)
    backend.init_forward_metadata(case.batch)
    return forward(backend, case.batch, queries), expected(case, queries, keys)


def replayed(case: Verification, attention: str = "trtllm_mla") -> tuple[torch.Tensor, torch.Tensor]:
    """A plan captured with other widths, when it holds those of `case`."""
    buckets, bucket = graded(REQUESTS * CONFIGURED), int(case.block.positions.shape[0])
    queries, keys = content(case)
    backend, graphs = backend_of(case, keys), graphs_of(buckets, attention)
    slots = graphs._ragged_capture_slots(bucket)
    backend.init_cuda_graph_state(graphs.max_bs, buckets[-1])
    captured = SimpleNamespace(**vars(case.batch))
    captured.batch_size, captured.spec_info = slots, graphs.get_spec_info(bucket)
    captured.req_pool_indices = torch.zeros(slots, dtype=torch.int64)
    captured.seq_lens = torch.ones(slots, dtype=torch.int64)
    captured.kv_loc_plan = case.translator.own_plan(captured)
    backend.init_forward_metadata_out_graph(captured, in_capture=True)
    captured.req_pool_indices[: len(case.widths)] = case.rows
    captured.seq_lens[: len(case.widths)] = case.batch.seq_lens
    slots_of = captured.spec_info.ragged_verify_layout.slots
    fill_slots(case.lens, case.batch.seq_lens, case.rows, slots_of, rows=bucket, empty=1)
    captured.kv_loc_plan = case.translator.own_plan(captured)
    backend.init_forward_metadata_out_graph(captured)
    return forward(backend, captured, queries), expected(case, queries, keys)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_rows_attend_to_what_comes_before_them(widths: list[int]) -> None:
    found, right = eager(Verification(widths, page=PAGE), rows_counted(RUNNER, max(widths)))
    torch.testing.assert_close(found[: len(right)], right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spare", [0, 1, 3])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_rows_of_a_replay_attend_to_what_comes_before_them(widths: list[int], spare: int) -> None:
    bucket = next(b for b in graded(REQUESTS * CONFIGURED) if b >= sum(widths) + spare)
    found, right = replayed(Verification(widths, bucket, page=PAGE))
    torch.testing.assert_close(found[: len(right)], right, atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


def test_rows_counted_as_the_widest_requests_would_see_what_comes_after_them() -> None:
    found, right = eager(Verification(WIDTHS["ragged"], page=PAGE), max(WIDTHS["ragged"]))
    assert not torch.allclose(found, right, atol=1e-2)
    found, right = replayed(Verification(WIDTHS["ragged"], 12, page=PAGE), "other")
    assert not torch.allclose(found[: len(right)], right, atol=1e-2)

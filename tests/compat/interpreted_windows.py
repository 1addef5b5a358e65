"""Verifications in layers with a sliding window and attention sinks, as SGLang's attention backends attend to them.

Run by `test_attention.py` in a child process, as `interpreted_attention.py`, whose batches it takes. Each backend's own
`forward_extend` runs on the plan that it made. Triton's kernels, SGLang's and ours ("split"), run too, under the
interpreter. The kernels of FA3, FA4 and TRT-LLM are loops that do what their documentation says
(`attention_formulas.py`). All are compared with one formula
in 64 bits, which knows positions and the table of slots, and no plan. K and V of windowed layers are in one pool with
the others', or in their own (`--swa-full-tokens-ratio`).
"""

import os
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from attention_formulas import flash, of_row, trtllm_decode
from interpreted_attention import CONFIGURED, CONTEXT, REQUESTS, Verification, captured
from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.attention.trtllm_mha_backend import TRTLLMHAAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from whiflash_kernels.triton_kernels import verify as kernel

from whiflash_sglang.device.capture import graded
from whiflash_sglang.engine.forward import triton_backend
from whiflash_sglang.engine.forward.triton_backend import RaggedTritonBackend, verify, widest_window
from whiflash_sglang.engine.launch import refusals

SGLANG = "sglang.srt.layers.attention"
HEADS, KV_HEADS, SIZE, SCALE = 4, 2, 16, 0.3
STARTS = [21, 2, 40]
"""Texts longer and shorter than any window here."""
WIDTHS = {"uniform": [3, 3, 3], "ragged": [3, 1, 9], "alone": [4], "plain": [1, 1, 1]}
WINDOWS = {"narrow": 2, "wide": 7, "whole": -1}
"""Keys before its own that a row sees: fewer than a block has rows, and more; all of them."""
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


class Pool:
    """K and V of one layer by slot, of which the rows of a verification are written."""

    def __init__(self) -> None:
        self.rows = 0
        self.keys, self.values = torch.randn(2, 4 * CONTEXT, KV_HEADS, SIZE, generator=generator(1))

    def written(self, where: Any) -> torch.Tensor:
        return where.loc

    def of(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots of the layer for `slots` of the table."""
        return slots.long()

    def set_kv_buffer(self, layer: Any, where: Any, keys: Any, values: Any, *scales: Any) -> None:
        """Rows that are nobody's go to a slot that nobody reads; here the table has every slot, so they go nowhere."""
        slots = self.written(where)[: self.rows]
        self.keys[slots] = keys.view(-1, KV_HEADS, SIZE)[: self.rows]
        self.values[slots] = values.view(-1, KV_HEADS, SIZE)[: self.rows]

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.values

    def get_kv_buffer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


class OwnPool(Pool, SWAKVPool):
    """The layer's own pool if it has a window: as SGLang keeps it, with no slots behind the requests' windows."""

    def __init__(self, window: int, page: int) -> None:
        super().__init__()
        pages = torch.randperm(4 * CONTEXT // page, generator=generator(4))
        slots = torch.arange(4 * CONTEXT)
        mapped = pages[slots // page] * page + slots % page
        self.layers_mapping = {0: (0, window > 0)}
        self.register_mapping(torch.cat((mapped, torch.tensor([-1]))))

    def written(self, where: Any) -> torch.Tensor:
        return where.swa_loc if self.layers_mapping[0][1] else where.loc

    def of(self, slots: torch.Tensor) -> torch.Tensor:
        return self.translate_loc_from_full_to_swa(slots.long()) if self.layers_mapping[0][1] else slots.long()

    def evict(self, case: Verification, window: int, page: int) -> None:
        """Whole pages behind each request's window."""
        for row, n in zip(case.rows, case.starts, strict=True):
            behind = max(n - window, 0) // page * page if window > 0 else n
            self.full_to_swa_index_mapping[case.table[row, :behind].long()] = 0


def verification(
    widths: list[int], window: int, pool: str, *, page: int = 1, bucket: int | None = None
) -> Verification:
    """A case with its pool, `case.kv`."""
    kv = OwnPool(window, page) if pool == "own" else Pool()
    case = Verification(widths, bucket, page, STARTS, kv if pool == "own" else None)
    kv.rows, case.kv = sum(widths), kv  # type: ignore[attr-defined]
    if isinstance(kv, OwnPool):
        kv.evict(case, window, page)
    return case


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def formula(case: Any, queries: Any, window: int, cap: float, sinks: Any) -> torch.Tensor:
    """[T, H, D]: every row sees the `window` positions before its own, and its own."""
    rows = []
    for i, position in enumerate(case.block.positions.tolist()[: sum(case.widths)]):
        first = 0 if window < 0 else max(position - window, 0)
        seen = case.kv.of(case.table[case.rows[case.block.request_of_row[i]], first : position + 1])
        rows.append(of_row(queries[i], case.kv.keys[seen], case.kv.values[seen], SCALE, cap, sinks))
    return torch.stack(rows)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{SGLANG}.flashattention_backend.flash_attn_with_kvcache", flash)
    decode = SimpleNamespace(trtllm_batch_decode_with_kv_cache=trtllm_decode)
    given = SimpleNamespace(decode=decode)
    monkeypatch.setattr(f"{SGLANG}.trtllm_mha_backend.flashinfer", given, raising=False)
    # Ours cuts even these prefixes, and reads windows of any width.
    for owner, name, value in (
        (kernel, "KEYS", 16),
        (kernel, "FEWEST_KEYS", 1),
        (kernel, "shares_for", lambda *_: 4),
        (triton_backend, "NARROWEST", 0),
    ):
        monkeypatch.setattr(owner, name, value)


def with_pool(backend: Any, case: Any) -> Any:
    backend.token_to_kv_pool = case.kv
    backend.use_sliding_window_kv_pool = isinstance(case.kv, OwnPool)
    return backend


def of_triton(case: Verification, window: int, cls: type = RaggedTritonBackend) -> Any:
    """With upstream's room: for the server's requests, of which a graph has slots besides."""
    most = REQUESTS + 1
    backend = case.backend(
        cls,
        dllm_attention=None,
        dcp_size=1,
        target_verify_num_tokens_per_req=CONFIGURED,
        num_draft_tokens=CONFIGURED,
        kv_indptr=torch.zeros(most, dtype=torch.int32),
        qo_indptr=torch.zeros(most, dtype=torch.int64),
        mask_indptr=torch.zeros(most, dtype=torch.int64),
        window_kv_indptr=torch.zeros(most, dtype=torch.int32) if window > 0 else None,
        num_head=4,
        v_head_dim=16,
        swa_v_head_dim=None,
        max_kv_splits=1,
        lean_total_programs=1,
        lean_block_m=1,
        use_dense_fp8_chunked_prefill=False,
        allow_bidirectional_attention_in_extend=False,
        extend_attention_fwd=extend_attention_fwd,
        enable_deterministic=False,
        use_mla=False,
        use_verify_shared_kv=False,
        use_verify_splitkv=False,
        _plans={},
    )
    backend.sliding_window_size = window if window > 0 else None
    return with_pool(backend, case)


def split(*args: Any, **named: Any) -> bool:
    """Our kernel, which may leave nothing to SGLang's."""
    with mock.patch.dict(os.environ, {"WHIFLASH_KERNELS": "triton"}):
        assert verify(*args, **named)
    return True


def of_split(case: Verification, window: int) -> Any:
    backend = of_triton(case, window)
    backend.use_verify_splitkv, backend.verify_splitkv_fwd = True, partial(split, plans=backend._plans)
    return backend


def of_fa3(case: Verification, window: int, version: int = 3) -> Any:
    backend = case.backend(
        FlashAttentionBackend,
        speculative_num_draft_tokens=CONFIGURED,
        local_attn_builder=None,
        is_prefill_aware_swa=False,
        is_encoder_decoder=False,
        has_swa=window > 0,
        fa_impl_ver=version,
        max_num_pages=CONTEXT,
        needs_cpu_seq_lens=False,
        use_mla=False,
        _get_scheduler_metadata=None,
        decode_cuda_graph_metadata={},
        attn_cp_size=1,
        kv_cache_dtype_str="auto",
        num_splits=0,
        kv_cache_is_mxfp8=False,
        fa_skip_kv_cache=False,
    )
    backend.sliding_window_size = window
    return with_pool(backend, case)


def of_fa4(case: Verification, window: int) -> Any:
    return of_fa3(case, window, 4)


def of_trtllm_mha(case: Verification, window: int) -> Any:
    backend = case.backend(
        TRTLLMHAAttnBackend,
        speculative_num_draft_tokens=CONFIGURED,
        is_xqa_impl=False,
        max_num_pages=CONTEXT,
        _swa_kv_pool=None,
        attn_cp_size=1,
        expand_encoder_only_verify=False,
        uses_trtllm_gen_native_fp4=False,
        use_fmha_v2=False,
        data_type=torch.float32,
        q_data_type=torch.float32,
        kv_cache_quant_method=SimpleNamespace(needs_global_scale=lambda: False),
        workspace_buffer=None,
        _multi_ctas_kv_counter_buffer=None,
    )
    if isinstance(case.kv, OwnPool):
        backend._swa_kv_pool = case.kv
        backend._swa_full_to_swa_mapping = case.kv.full_to_swa_index_mapping
    return with_pool(backend, case)


BACKENDS = {"triton": of_triton, "split": of_split, "fa3": of_fa3, "fa4": of_fa4, "trtllm_mha": of_trtllm_mha}


def forward(
    backend: Any, case: Verification, window: int, *, cap: float = 0.0, sinks: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of a backend for its plan, and the formula: [T, H, D] each."""
    layer = RadixAttention(HEADS, SIZE, SCALE, KV_HEADS, layer_id=0, logit_cap=cap, sliding_window_size=window)
    case.batch.out_cache_loc_is_physical, case.batch.mha_one_shot = False, False
    case.batch._attn_output = case.batch.attn_attend_prefix_cache = None
    rows = len(case.block.positions)
    queries = torch.randn(rows, HEADS, SIZE, generator=generator(2))
    keys, values = torch.randn(2, rows, KV_HEADS, SIZE, generator=generator(3))
    named = {} if sinks is None else {"sinks": sinks}
    out = backend.forward_extend(queries.flatten(1), keys, values, layer, case.batch, **named)
    total = sum(case.widths)
    return out.view(-1, HEADS, SIZE)[:total], formula(case, queries, window, cap, sinks)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pool", ["one", "own"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("shape", [*WIDTHS, "pages"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_see_their_own_windows(backend: str, shape: str, window: int, pool: str) -> None:
    widths, page = WIDTHS.get(shape, WIDTHS["ragged"]), 16 if shape == "pages" else 1
    case = verification(widths, window, pool, page=page)
    made = BACKENDS[backend](case, window)
    made.page_size = page
    if backend == "trtllm_mha":
        made.max_num_pages = CONTEXT // page
    made.init_forward_metadata(case.batch)
    assert close(*forward(made, case, window, sinks=SINKS))
    assert close(*forward(made, case, window))


@pytest.mark.parametrize("pool", ["one", "own"])
@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_replayed_rows_see_what_eager_ones_do(
    backend: str, widths: list[int], window: int, spare: int, pool: str
) -> None:
    """A captured plan, filled for this batch; padding rows after its own."""
    bucket = next(b for b in graded(REQUESTS * CONFIGURED) if b >= sum(widths) + spare)
    case = verification(widths, window, pool, bucket=bucket)
    made = BACKENDS[backend](case, window)
    captured(case, made)
    replayed, expected = forward(made, case, window, sinks=SINKS)
    assert close(replayed, expected)
    eager_case = verification(widths, window, pool)
    eager = BACKENDS[backend](eager_case, window)
    eager.init_forward_metadata(eager_case.batch)
    if backend in ("triton", "split") and window > 0:
        many, (now, then) = len(widths), (made.forward_metadata, eager.forward_metadata)
        assert now.window_kv_indptr[: many + 1].tolist() == then.window_kv_indptr.tolist()
        keys = int(then.window_kv_indptr[-1])
        assert now.window_kv_indices[:keys].tolist() == then.window_kv_indices.tolist()
        assert now.window_kv_offsets[:many].tolist() == then.window_kv_offsets.tolist()
        assert now.custom_mask is then.custom_mask is None


def test_a_forward_is_planned_for_its_own_lengths() -> None:
    """Each eager one, and each run of a captured one, though their tensors are at the same places."""
    made = of_split(verification(WIDTHS["uniform"], -1, "one"), -1)
    for widths in (WIDTHS["uniform"], WIDTHS["ragged"]):
        case = verification(widths, -1, "one")
        with_pool(made, case).init_forward_metadata(case.batch)
        assert close(*forward(made, case, -1))
    case = verification(WIDTHS["ragged"], -1, "one", bucket=16)
    captured(case, with_pool(made, case))
    for offsets in ([0, 13, 13, 13], case.offsets):
        made.qo_indptr[:4] = torch.tensor(offsets)
        made.init_forward_metadata_in_graph(case.batch)
        found = forward(made, case, -1)
    assert close(*found)


def test_capped_scores_are_capped_within_a_window() -> None:
    """Gemma 2's; TRT-LLM's backend hands on no cap."""
    for name in ("triton", "split", "fa3", "fa4"):
        case = verification(WIDTHS["ragged"], 7, "one")
        made = BACKENDS[name](case, 7)
        made.init_forward_metadata(case.batch)
        assert close(*forward(made, case, 7, cap=2.0))


@pytest.mark.parametrize("pool", ["one", "own"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_chunk_of_a_prompt_sees_the_window_before_it(window: int, pool: str) -> None:
    case = verification([5, 20, 3], window, pool)
    made, starts = of_triton(case, window), torch.tensor(STARTS)
    case.batch.forward_mode, case.batch.spec_info = ForwardMode.EXTEND, None
    case.batch.extend_prefix_lens, case.batch.extend_prefix_lens_cpu = starts, STARTS
    case.batch.extend_seq_lens, case.batch.extend_seq_lens_cpu = case.lens, case.widths
    case.batch.seq_lens = starts + case.lens
    made.init_forward_metadata(case.batch)
    assert close(*forward(made, case, window, sinks=SINKS))


def test_what_is_wrong_is_told_apart() -> None:
    """A window that is one too long or too short, none, and sinks that are left out."""
    for name, make in BACKENDS.items():
        case = verification(WIDTHS["ragged"], 7, "one")
        made = make(case, 7)
        made.init_forward_metadata(case.batch)
        right, expected = forward(made, case, 7, sinks=SINKS)
        assert close(right, expected)
        for window, sinks in ((6, SINKS), (8, SINKS), (7, None), (-1, SINKS)):
            # A layer's own may not be wider than what was planned.
            if window != 8 or name not in ("triton", "split"):
                assert not close(forward(made, case, window, sinks=sinks)[0], expected), (name, window)


def test_of_several_windows_the_widest_is_planned() -> None:
    """A model whose class does not say its window (Laguna) has it all the same; the kernel masks the narrower ones."""
    kinds = (-1, 2, 7)
    layers = [RadixAttention(HEADS, SIZE, SCALE, KV_HEADS, i, sliding_window_size=w) for i, w in enumerate(kinds)]
    assert widest_window(torch.nn.ModuleList(layers)) == 7
    assert widest_window(torch.nn.ModuleList(layers[:1])) is None
    case = verification(WIDTHS["ragged"], 7, "one")
    made = of_triton(case, 7)
    made.init_forward_metadata(case.batch)
    for window in kinds:
        assert close(*forward(made, case, window))


@pytest.mark.parametrize("slots", [REQUESTS - 2, REQUESTS + 3])
def test_there_is_room_for_the_servers_requests_and_a_graphs_slots(slots: int) -> None:
    made = of_triton(verification(WIDTHS["ragged"], 7, "one"), 7)
    made.init_cuda_graph_state(slots, slots)
    offsets = (made.kv_indptr, made.qo_indptr, made.mask_indptr, made.window_kv_indptr)
    assert [len(each) for each in offsets] == [max(slots, REQUESTS) + 1] * 4


def test_what_is_refused_plans_other_rows() -> None:
    """Upstream's own Triton gives every request the widest one's rows, and its graphs no room to spare requests."""
    case = verification(WIDTHS["ragged"], -1, "one")
    upstreams = of_triton(case, -1, TritonAttnBackend)
    upstreams.init_forward_metadata(case.batch)
    assert upstreams.forward_metadata.qo_indptr.tolist() != case.offsets
    padded = verification(WIDTHS["ragged"], -1, "one", bucket=16)
    with pytest.raises(RuntimeError, match="size"):
        captured(padded, of_triton(padded, -1, TritonAttnBackend))
    # XQA (Hopper, SM120) takes no layout at all, of whatever widths.
    with pytest.raises(NotImplementedError, match="xqa"):
        case.backend(TRTLLMHAAttnBackend, is_xqa_impl=True).init_forward_metadata(case.batch)


def test_every_backend_that_is_allowed_is_asked() -> None:
    assert set(BACKENDS) - {"split"} == set(refusals.ATTENTIONS)


def test_what_is_left_to_sglangs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "NARROWEST", 2048)
    monkeypatch.setenv("WHIFLASH_KERNELS", "triton")
    monkeypatch.setattr(triton_backend, "verify_attention", lambda *args, **named: handed.append(named))
    q, k, pool, indptr = torch.zeros(3, 4, 16), torch.zeros(3, 2, 16), torch.zeros(9, 2, 16), torch.zeros(2)
    usual = {"logit_cap": 0.0, "sliding_window_size": -1, "sinks": None, "xai_temperature_len": -1}
    handed: list[Any] = []

    def ran(
        q: Any = q, k: Any = k, pools: Any = (pool, pool), mask: Any = None, causal: bool = True, **named: Any
    ) -> bool:
        v = k[..., : pools[1].shape[2]]
        tensors = q, k, v, torch.zeros_like(q), *pools, indptr, indptr, indptr
        return verify(*tensors, mask, causal, None, 3, 1.0, 1.0, SCALE, **usual | named, max_bs=4)

    assert all(ran(sliding_window_size=window) for window in (-1, 0, 2048, 4096))
    assert [named["window"] for named in handed] == [None, None, 2048, 4096]
    eight = pool.to(torch.float8_e4m3fn)
    assert ran(pools=(eight, eight))
    for refused in (
        {"mask": torch.zeros(1)},
        {"causal": False},
        {"xai_temperature_len": 1},
        {"sliding_window_size": 2047},
        {"pools": (pool.to(torch.uint8),) * 2},
        {"pools": (pool, pool[..., :8])},
        {"q": q.repeat(1, 1, 20), "k": k.repeat(1, 1, 20), "pools": (pool.repeat(1, 1, 20),) * 2},
    ):
        assert not ran(**refused), refused
    monkeypatch.setenv("WHIFLASH_KERNELS", "torch")
    assert not ran()

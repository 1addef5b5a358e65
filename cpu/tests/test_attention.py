"""The attention backend's lengths and masks in every forward mode, against the paged attention itself."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.ragged_verify import RaggedVerifyLayout
from whiflash_kernels.cpu import compiler
from whiflash_kernels.cpu.paged_attention import CompiledAttention, CompiledPlan
from whiflash_kernels.reference.paged_attention import PagedAttentionPlan

from whiflash_cpu import attention
from whiflash_cpu.attention import CpuAttentionBackend, CpuMultiStepDraftBackend, attention_kernel

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 16, 256
SCALE = DIM**-0.5


class Pool:
    """A one-layer KV pool of random entries that records what is written."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.k = torch.randn(SLOTS, KV_HEADS, DIM, generator=generator).to(dtype)
        self.v = torch.randn(SLOTS, KV_HEADS, DIM, generator=generator).to(dtype)

    def set_kv_buffer(self, layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k[where.loc] = k
        self.v[where.loc] = v

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.k

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.v


class TwoPools(Pool, SWAKVPool):
    """The same entries for a windowed layer, 1, by slots of its own: some slots have none."""

    def __init__(self, pool: Pool) -> None:
        self.k, self.v = pool.k.clone(), pool.v.clone()
        self.layers_mapping = {0: (0, False), 1: (0, True)}
        own = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(2))
        self.own_k, self.own_v = torch.empty_like(self.k), torch.empty_like(self.v)
        self.own_k[own], self.own_v[own] = self.k, self.v
        self.register_mapping(torch.cat((own, torch.tensor([-1]))))

    def set_kv_buffer(self, layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        if layer.layer_id:
            self.own_k[where.swa_loc], self.own_v[where.swa_loc] = k, v
        else:
            super().set_kv_buffer(layer, where, k, v)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.own_k if layer_id else self.k

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.own_v if layer_id else self.v


@cache
def ensured_kernel() -> CompiledAttention | None:
    """The compiled kernel, also without AVX2; None without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "has_avx2", lambda: True)
        return attention_kernel.__wrapped__()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A runner with a pool in float32, which runs in torch, or in bfloat16, which is compiled, on any processor."""
    if request.param == torch.bfloat16:
        kernel = ensured_kernel()
        if kernel is None:
            pytest.skip("no C++ compiler here")
        monkeypatch.setattr(attention, "attention_kernel", lambda: kernel)
    table = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1)).view(4, 64).to(torch.int32)
    return SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=Pool(request.param))


def layer(attn_type: AttentionType = AttentionType.DECODER, **changes: Any) -> Any:
    fields = {
        "layer_id": 0,
        "tp_q_head_num": HEADS,
        "tp_k_head_num": KV_HEADS,
        "qk_head_dim": DIM,
        "v_head_dim": DIM,
        "scaling": SCALE,
        "is_cross_attention": False,
        "sliding_window_size": -1,
        "logit_cap": 0.0,
        "attn_type": attn_type,
    }
    return SimpleNamespace(**fields | changes)


def batch(mode: ForwardMode, seq_lens: list[int], **fields: Any) -> Any:
    rows = torch.tensor([2, 0, 3][: len(seq_lens)])
    return SimpleNamespace(
        forward_mode=mode,
        seq_lens=torch.tensor(seq_lens),
        req_pool_indices=rows,
        out_cache_loc=None,
        spec_info=None,
        **fields,
    )


def attend(backend: CpuAttentionBackend, rows: int, forward_batch: Any, of: Any) -> torch.Tensor:
    query = torch.randn(rows, HEADS * DIM, generator=torch.Generator().manual_seed(3))
    query = query.to(backend.token_to_kv_pool.k.dtype)
    return backend.forward(query, None, None, of, forward_batch, save_kv_cache=False)


def expected(runner: Any, q_lens: list[int], kv_lens: list[int], rows: torch.Tensor, causal: bool) -> torch.Tensor:
    query = torch.randn(sum(q_lens), HEADS, DIM, generator=torch.Generator().manual_seed(3))
    table = runner.req_to_token_pool.req_to_token[rows]
    plan = PagedAttentionPlan.build(table, q_lens, kv_lens, causal=causal)
    pool = runner.token_to_kv_pool
    query = query.to(pool.k.dtype).float()
    return plan.run(query, pool.k.float(), pool.v.float(), SCALE).reshape(sum(q_lens), HEADS * DIM)


def check(runner: Any, forward_batch: Any, q_lens: list[int], kv_lens: list[int], **kind: Any) -> None:
    backend = kind.pop("backend", None) or CpuAttentionBackend(runner)
    of = layer(**kind)
    backend.init_forward_metadata(forward_batch)
    found = attend(backend, sum(q_lens), forward_batch, of)
    causal = of.attn_type == AttentionType.DECODER
    wanted = expected(runner, q_lens, kv_lens, forward_batch.req_pool_indices, causal)
    exact = found.dtype == torch.float32
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0 if exact else 2**-7)
    (plan,) = backend._plans.values()
    assert isinstance(plan, PagedAttentionPlan if exact else CompiledPlan)


def test_decoding(runner: Any) -> None:
    check(runner, batch(ForwardMode.DECODE, [5, 40, 17]), [1, 1, 1], [5, 40, 17])


def test_prefill_with_prefix(runner: Any) -> None:
    forward_batch = batch(ForwardMode.EXTEND, [9, 30], extend_seq_lens=torch.tensor([9, 4]))
    check(runner, forward_batch, [9, 4], [9, 30])


def test_draft_extend(runner: Any) -> None:
    forward_batch = batch(ForwardMode.DRAFT_EXTEND_V2, [12, 30], extend_seq_lens=torch.tensor([5, 5]))
    check(runner, forward_batch, [5, 5], [12, 30])


def test_uniform_verification_sees_the_rows_after_seq_lens(runner: Any) -> None:
    forward_batch = batch(ForwardMode.TARGET_VERIFY, [10, 21, 3])
    forward_batch.spec_info = SimpleNamespace(draft_token_num=4)
    check(runner, forward_batch, [4, 4, 4], [14, 25, 7])


def test_ragged_verification(runner: Any) -> None:
    layout = RaggedVerifyLayout.from_verify_lens(verify_lens_cpu=[1, 8, 3], device=torch.device("cpu"), grid=[12])
    forward_batch = batch(ForwardMode.TARGET_VERIFY, [10, 21, 3])
    forward_batch.spec_info = SimpleNamespace(draft_token_num=8, ragged_verify_layout=layout)
    check(runner, forward_batch, [1, 8, 3], [11, 29, 6])


def test_the_diffusion_block_is_not_causal(runner: Any) -> None:
    forward_batch = batch(ForwardMode.TARGET_VERIFY, [10, 21])
    forward_batch.spec_info = SimpleNamespace(draft_token_num=8)
    check(runner, forward_batch, [8, 8], [18, 29], attn_type=AttentionType.ENCODER_ONLY)


def test_chain_steps_see_one_more_entry_each(runner: Any) -> None:
    steps = CpuMultiStepDraftBackend(runner, 1, 4)
    forward_batch = batch(ForwardMode.DECODE, [5, 40])
    assert len(steps.attn_backends) == 3
    for step, backend in enumerate(steps.attn_backends):
        check(runner, forward_batch, [1, 1], [6 + step, 41 + step], backend=backend)


def test_own_keys_are_written_before_they_are_read(runner: Any) -> None:
    forward_batch = batch(ForwardMode.DECODE, [6])
    slot = runner.req_to_token_pool.req_to_token[2, 5].long()
    forward_batch.out_cache_loc = slot.view(1)
    backend = CpuAttentionBackend(runner)
    backend.init_forward_metadata(forward_batch)
    dtype = runner.token_to_kv_pool.k.dtype
    query = torch.zeros(1, HEADS * DIM, dtype=dtype)
    value = torch.full((1, KV_HEADS, DIM), 1e6, dtype=dtype)
    out = backend.forward(query, torch.zeros(1, KV_HEADS, DIM, dtype=dtype), value, layer(), forward_batch)
    assert bool((out > 1e4).all())


@pytest.mark.parametrize("window", [4, -1])
def test_windowed_layers_have_slots_of_their_own(runner: Any, window: int) -> None:
    """One pool and two give the same outputs; before the windows there are no slots."""
    forward_batch, table = batch(ForwardMode.EXTEND, [9, 30, 40]), runner.req_to_token_pool.req_to_token
    forward_batch.extend_seq_lens = torch.tensor([9, 4, 1])
    rows, ends = forward_batch.req_pool_indices.tolist(), [9, 30, 40]
    written = [table[row, n - m : n] for row, n, m in zip(rows, ends, (9, 4, 1), strict=True)]
    forward_batch.out_cache_loc = torch.cat(written).long()
    keys, values = torch.randn(2, 14, KV_HEADS, DIM).to(runner.token_to_kv_pool.k.dtype)
    pool = TwoPools(runner.token_to_kv_pool)
    if window > 0:
        pool.full_to_swa_index_mapping[table[3, :35].long()] = 0
    query = torch.randn(14, HEADS * DIM).to(keys.dtype)
    found = []
    for kv in (runner.token_to_kv_pool, pool):
        backend = CpuAttentionBackend(SimpleNamespace(req_to_token_pool=runner.req_to_token_pool, token_to_kv_pool=kv))
        backend.init_forward_metadata(forward_batch)
        for number, seen in ((0, -1), (1, window)):
            of = layer(layer_id=number, sliding_window_size=seen)
            found.append(backend.forward(query, keys, values, of, forward_batch))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_layers_share_one_plan_per_kind(runner: Any) -> None:
    forward_batch = batch(ForwardMode.DECODE, [5, 40])
    backend = CpuAttentionBackend(runner)
    backend.init_forward_metadata(forward_batch)
    for of in (layer(), layer(), layer(sliding_window_size=4), layer(AttentionType.ENCODER_ONLY)):
        attend(backend, 2, forward_batch, of)
    assert len(backend._plans) == 3


@pytest.mark.parametrize(
    ("changes", "message"), [({"is_cross_attention": True}, "cross"), ({"logit_cap": 30.0}, "logit cap of 30")]
)
def test_what_it_does_not_serve_is_refused(runner: Any, changes: dict[str, Any], message: str) -> None:
    forward_batch = batch(ForwardMode.DECODE, [5])
    backend = CpuAttentionBackend(runner)
    backend.init_forward_metadata(forward_batch)
    with pytest.raises(NotImplementedError, match=message):
        attend(backend, 1, forward_batch, layer(**changes))


def test_trees_are_refused(runner: Any) -> None:
    with pytest.raises(ValueError, match="speculative-eagle-topk 1"):
        CpuMultiStepDraftBackend(runner, 2, 4)

"""A CPU's attention, compiled and in torch, against the formula in float64, alone and beside others."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from whiflash_kernels.cpu import compiler
from whiflash_kernels.cpu import paged_attention as module
from whiflash_kernels.cpu.paged_attention import CompiledAttention, compiled_attention, fits
from whiflash_kernels.reference import paged_attention
from whiflash_kernels.reference.paged_attention import PagedAttentionPlan

SLOTS = 1600


@dataclass(frozen=True)
class InTorch:
    """Torch's plan, called as the compiled kernel is."""

    dtype: torch.dtype

    def plan(self, *lengths: Any, **kind: Any) -> PagedAttentionPlan:
        return PagedAttentionPlan.build(*lengths, **kind)


@pytest.fixture(scope="module", params=["this processor", "x86-64-v3", torch.float32, torch.bfloat16], ids=str)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiled for this processor, and for one without instructions for bfloat16; in torch."""
    if isinstance(request.param, torch.dtype):
        return InTorch(request.param)
    directory = tmp_path_factory.getbasetemp().parent / "compiled"
    try:
        if request.param == "this processor":
            return compiled_attention(directory)
        flags = ["-fopenmp", f"-march={request.param}"]
        return CompiledAttention(compiler.load(module._SOURCE, directory, flags))
    except OSError as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Case:
    """A batch, and which of the kernel's ways it takes: head sizes, who is seen, the layout of tensors."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    kv_heads: int = 2
    share: int = 3
    size: int = 64
    v_size: int = 64
    causal: bool = True
    window: int | None = None
    sinks: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Tensors:
    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    rows: Tensor
    sinks: Tensor | None


@pytest.fixture
def compiled(kernel: Any) -> CompiledAttention:
    if isinstance(kernel, InTorch):
        pytest.skip("of what is compiled")
    found: CompiledAttention = kernel
    return found


def tensors_of(case: Case, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Queries that are part of a wider tensor, as a model's are; rows of the slot table in any order; slots that nobody
    sees hold rubbish."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    bs, heads = len(case.q_lens), case.kv_heads * case.share
    slots = torch.randperm(SLOTS, generator=generator)
    table = torch.zeros(bs + 2, max(case.kv_lens), dtype=torch.int32)
    rows = torch.randperm(bs + 2, generator=generator)[:bs]
    k = torch.full((SLOTS, case.kv_heads, case.size), float("nan")).to(dtype)
    v = torch.full((SLOTS, case.kv_heads, case.v_size), float("nan")).to(dtype)
    used = 0
    for row, length in zip(rows.tolist(), case.kv_lens, strict=True):
        own = slots[used : used + length]
        table[row, :length] = own
        k[own], v[own] = normal(length, *k.shape[1:]), normal(length, *v.shape[1:])
        used += length
    wide = normal(sum(case.q_lens), heads * case.size + 40)
    return Tensors(
        q=wide[:, 8 : 8 + heads * case.size].view(-1, heads, case.size),
        k=k,
        v=v,
        table=table,
        rows=rows,
        sinks=2 * normal(heads) + math.log(max(case.kv_lens)) if case.sinks else None,
    )


def run(kernel: Any, case: Case, x: Tensors, scale: float | None = None) -> Tensor:
    plan = kernel.plan(x.table, case.q_lens, case.kv_lens, causal=case.causal, request_rows=x.rows, window=case.window)
    assert isinstance(kernel, InTorch) or fits(x.q, x.k, x.v)
    found: Tensor = plan.run(x.q, x.k, x.v, scale or case.size**-0.5, x.sinks)
    return found


def by_formula(case: Case, x: Tensors, scale: float | None = None) -> Tensor:
    out, row = torch.empty(*x.q.shape[:2], case.v_size, dtype=torch.float64), 0
    for request, m, n in zip(x.rows.tolist(), case.q_lens, case.kv_lens, strict=True):
        slots = x.table[request, :n].long()
        k = x.k[slots].double().repeat_interleave(case.share, 1)
        v = x.v[slots].double().repeat_interleave(case.share, 1)
        scores = torch.einsum("thd,jhd->htj", x.q[row : row + m].double(), k) * (scale or case.size**-0.5)
        last = torch.arange(n - m, n)[:, None] if case.causal else torch.full((m, 1), n - 1)
        entry = torch.arange(n)
        hidden = entry > last
        if case.causal and case.window is not None:
            hidden |= entry < last - case.window
        weights = scores.masked_fill(hidden, float("-inf")).exp()
        beside = 0.0 if x.sinks is None else x.sinks.double().exp()[:, None]
        mixed = torch.einsum("htj,jhd->htd", weights, v) / (weights.sum(-1) + beside)[..., None]
        out[row : row + m] = mixed.transpose(0, 1)
        row += m
    return out


@st.composite
def cases(draw: st.DrawFn) -> Case:
    causal = draw(st.booleans())
    q_lens = draw(st.lists(st.sampled_from([0, 1, 1, 2, 5, 17, 64, 65, 130]), min_size=1, max_size=4))
    extra = st.sampled_from([0, 1, 14, 63, 64, 200])
    return Case(
        q_lens=tuple(q_lens),
        kv_lens=tuple((max(m, 1) if causal else 1) + draw(extra) for m in q_lens),
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        share=draw(st.sampled_from([1, 2, 3, 7])),
        size=draw(st.sampled_from([2, 16, 64, 80, 128])),
        v_size=draw(st.sampled_from([16, 64, 80, 128])),
        causal=causal,
        window=draw(st.sampled_from([None, None, 0, 1, 63, 100])),
        sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


def agrees(kernel: Any, case: Case, scale: float | None = None) -> None:
    dtype = kernel.dtype if isinstance(kernel, InTorch) else torch.bfloat16
    x = tensors_of(case, dtype)
    found = run(kernel, case, x, scale)
    assert found.dtype == dtype
    # In bfloat16 weights and the result are rounded to 8 bits each.
    most = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), by_formula(case, x, scale), rtol=most, atol=most)


@settings(deadline=None, max_examples=120)
@given(case=cases())
@example(Case((1,), (1500,)))  # a decode step; these have several chunks
@example(Case((3, 1), (1100, 490)))  # a verification
@example(Case((3,), (1500,), window=700))
@example(Case((3,), (1500,), sinks=True))
@example(Case((600,), (1500,), kv_heads=1, window=300))  # a prefix
@example(Case((64,), (1025,), causal=False))  # a block
@example(Case((4,), (513,), kv_heads=1, share=16, size=576, v_size=512))  # latent
def test_it_is_the_formula(kernel: Any, case: Case) -> None:
    agrees(kernel, case)


@pytest.mark.parametrize("rows", [3, 5])
@settings(deadline=None, max_examples=100)
@given(case=cases())
def test_however_rows_are_cut_into_blocks(case: Case, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention, "ROWS", rows)
        agrees(InTorch(torch.float32), case)


def test_scores_stay_in_fp32() -> None:
    """At a scale of 8 scores reach a hundred: rounded to bfloat16 they would be off by a quarter."""
    agrees(InTorch(torch.bfloat16), Case((100, 70), (160, 70), kv_heads=3, size=16, v_size=16, seed=5), 8.0)


def test_values_may_be_a_part_of_keys(compiled: CompiledAttention) -> None:
    """As in latent attention, where the pool has one tensor for both."""
    case = Case((2, 9), (70, 9), kv_heads=1, share=4, size=80, v_size=64)
    x = tensors_of(case)
    shared = Tensors(x.q, x.k, x.k[..., :64], x.table, x.rows, None)
    torch.testing.assert_close(run(compiled, case, shared).double(), by_formula(case, shared), rtol=2**-7, atol=2**-7)


@settings(deadline=None, max_examples=60)
@given(case=cases(), others=st.integers(1, 3), threads=st.sampled_from([1, 3]))
def test_a_request_does_not_depend_on_others_or_on_threads(kernel: Any, case: Case, others: int, threads: int) -> None:
    """Alone as beside any others, on any number of threads; what is compiled bit by bit."""
    exact = not isinstance(kernel, InTorch)
    x = tensors_of(case, torch.bfloat16 if exact else kernel.dtype)
    together = run(kernel, case, x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        row = 0
        for request, (m, n) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
            plan = kernel.plan(
                x.table, [m], [n], causal=case.causal, request_rows=x.rows[request : request + 1], window=case.window
            )
            alone = plan.run(x.q[row : row + m], x.k, x.v, case.size**-0.5, x.sinks)
            most = 0.0 if exact else 2e-6 if kernel.dtype == torch.float32 else 2**-7
            torch.testing.assert_close(alone, together[row : row + m], rtol=most, atol=most)
            row += m
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("window", [None, 90])
def test_a_verified_row_is_the_decoded_one(compiled: CompiledAttention, window: int | None) -> None:
    """Bit by bit: a token's row in a verification is that of decoding it alone."""
    m, n = 9, 1030
    case = Case((m,), (n,), window=window)
    x = tensors_of(case)
    verified = run(compiled, case, x)
    for i in range(m):
        plan = compiled.plan(x.table, [1], [n - m + i + 1], causal=True, request_rows=x.rows, window=window)
        assert torch.equal(plan.run(x.q[i : i + 1], x.k, x.v, case.size**-0.5), verified[i : i + 1])


def test_what_it_does_not_take() -> None:
    q, k = torch.zeros(1, 2, 64).bfloat16(), torch.zeros(4, 2, 64).bfloat16()
    assert fits(q, k, k)
    assert not fits(q.float(), k, k)
    assert not fits(q, k.half(), k)
    assert not fits(q, k, k[..., :24])
    assert not fits(q[..., :63], k[..., :63], k)
    assert not fits(q, k.transpose(1, 2), k)


@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "message"),
    [
        ([1, 1], [4], "2 requests"),
        ([5], [4], "request 0: 5 query rows do not fit 4 KV entries"),
        ([1], [0], "do not fit 0"),
        ([1], [9], "9 KV entries, the slot table 8"),
    ],
)
def test_lengths_are_checked(kernel: Any, q_lens: list[int], kv_lens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.plan(torch.zeros(1, 8, dtype=torch.int32), q_lens, kv_lens, causal=True)


def test_no_rows_are_no_work(kernel: Any) -> None:
    x = tensors_of(Case((1,), (5,)), torch.bfloat16 if isinstance(kernel, CompiledAttention) else kernel.dtype)
    for widths, lengths in (((), ()), ((0,), (5,))):
        plan = kernel.plan(x.table, widths, lengths, causal=True)
        assert plan.run(x.q[:0], x.k, x.v, 1.0).shape == (0, 6, 64)

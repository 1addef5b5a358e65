"""The paged attention against a naive fp64 reference, over ragged shapes."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from whiflash_kernels.reference import grouping, paged_attention
from whiflash_kernels.reference.paged_attention import PagedAttentionPlan

SLOTS = 512
HEAD_DIM = 16


@dataclass(frozen=True)
class Case:
    """One batch: lengths per request, head counts and the kind of attention."""

    q_lens: list[int]
    kv_lens: list[int]
    kv_heads: int
    groups: int
    causal: bool
    window: int | None
    seed: int
    sinks: bool = False


@st.composite
def cases(draw: st.DrawFn) -> Case:
    causal = draw(st.booleans())
    width = st.sampled_from([0, 1, 1, 2, 8, 13])
    q_lens = draw(st.lists(width, min_size=1, max_size=5))
    if draw(st.booleans()):
        q_lens = [q_lens[0]] * len(q_lens)
    extra = [draw(st.integers(0, 24)) for _ in q_lens]
    kv_lens = [max(m, 1) + e if causal else 1 + e for m, e in zip(q_lens, extra, strict=True)]
    return Case(
        q_lens=q_lens,
        kv_lens=kv_lens,
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        groups=draw(st.sampled_from([1, 2, 3])),
        causal=causal,
        window=draw(st.sampled_from([None, None, 0, 1, 7])),
        seed=draw(st.integers(0, 999)),
        sinks=draw(st.booleans()),
    )


@dataclass(frozen=True)
class Tensors:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    table: torch.Tensor
    sinks: torch.Tensor | None


def make_tensors(case: Case, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    width = max(case.kv_lens)
    table = torch.randperm(SLOTS, generator=generator)[: len(case.q_lens) * width]
    return Tensors(
        q=random(sum(case.q_lens), case.kv_heads * case.groups, HEAD_DIM),
        k_cache=random(SLOTS, case.kv_heads, HEAD_DIM),
        v_cache=random(SLOTS, case.kv_heads, HEAD_DIM),
        table=table.view(len(case.q_lens), width).to(torch.int32),
        sinks=2 * random(case.kv_heads * case.groups) if case.sinks else None,
    )


def reference(case: Case, tensors: Tensors, scale: float) -> torch.Tensor:
    """Row by row and head by head, in fp64, from the definition."""
    rows = []
    row = 0
    for request, (m, n) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        for i in range(m):
            last = n - m + i if case.causal else n - 1
            first = max(0, last - case.window) if case.causal and case.window is not None else 0
            slots = tensors.table[request, first : last + 1].long()
            for head in range(tensors.q.shape[1]):
                k = tensors.k_cache[slots, head // case.groups].double()
                v = tensors.v_cache[slots, head // case.groups].double()
                weights = (k @ tensors.q[row, head].double() * scale).exp()
                beside = 0.0 if tensors.sinks is None else tensors.sinks[head].double().exp()
                rows.append(weights @ v / (weights.sum() + beside))
            row += 1
    heads = tensors.q.shape[1]
    return torch.stack(rows).view(-1, heads, HEAD_DIM) if rows else torch.zeros(0, heads, HEAD_DIM).double()


def run(case: Case, tensors: Tensors, scale: float = 0.25) -> torch.Tensor:
    plan = PagedAttentionPlan.build(
        tensors.table,
        case.q_lens,
        case.kv_lens,
        causal=case.causal,
        dtype=tensors.q.dtype,
        window=case.window,
    )
    return plan.run(tensors.q, tensors.k_cache, tensors.v_cache, scale, tensors.sinks)


def agrees_with_the_reference(case: Case) -> None:
    tensors = make_tensors(case)
    expected = reference(case, tensors, 0.25)
    found = run(case, tensors)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=150)
@given(cases())
def test_equals_the_reference(case: Case) -> None:
    agrees_with_the_reference(case)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_wide_requests_equal_the_reference(case: Case) -> None:
    """The same, with limits so low that requests are split into blocks and mixed with narrow ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention, "NARROW_ROWS", 3)
        patch.setattr(paged_attention, "WIDE_ROWS", 5)
        patch.setattr(grouping, "GROUP", case.seed % 2 * grouping.GROUP)
        agrees_with_the_reference(case)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_groups_equal_the_reference(case: Case) -> None:
    """The same, where groups cost so little that no request is padded for another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "GROUP", 0.1)
        agrees_with_the_reference(case)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_a_request_does_not_depend_on_its_batch(case: Case) -> None:
    tensors = make_tensors(case)
    together = run(case, tensors)
    start = 0
    for i, (m, n) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        alone = replace(case, q_lens=[m], kv_lens=[n])
        mine = replace(tensors, q=tensors.q[start : start + m], table=tensors.table[i : i + 1])
        torch.testing.assert_close(together[start : start + m], run(alone, mine), rtol=0, atol=2e-6)
        start += m


def test_garbage_outside_the_requests_slots_is_never_read() -> None:
    case = Case([1, 8, 3], [30, 12, 3], 2, 2, True, None, 0)
    tensors = make_tensors(case)
    expected = run(case, tensors)
    used = {int(s) for i, n in enumerate(case.kv_lens) for s in tensors.table[i, :n]}
    for slot in set(range(SLOTS)) - used:
        tensors.k_cache[slot] = float("nan")
        tensors.v_cache[slot] = float("nan")
    assert torch.equal(run(case, tensors), expected)


def test_rows_of_a_larger_table() -> None:
    case = Case([2, 1], [9, 5], 2, 1, True, None, 3)
    tensors = make_tensors(case)
    whole = torch.zeros(7, 40, dtype=torch.int32)
    whole[[5, 2], : tensors.table.shape[1]] = tensors.table
    plan = PagedAttentionPlan.build(
        whole,
        case.q_lens,
        case.kv_lens,
        causal=True,
        dtype=torch.float32,
        request_rows=torch.tensor([5, 2]),
    )
    found = plan.run(tensors.q, tensors.k_cache, tensors.v_cache, 0.25)
    assert torch.equal(found, run(case, tensors))


def test_bfloat16_stays_near_the_reference() -> None:
    case = Case([8, 8, 1], [160, 40, 90], 3, 3, True, None, 5)
    tensors = make_tensors(case, torch.bfloat16)
    found = run(case, tensors)
    assert found.dtype == torch.bfloat16
    # 8 bits of mantissa on values of order one.
    torch.testing.assert_close(found.double(), reference(case, tensors, 0.25), rtol=0, atol=2e-2)


def test_a_prefill_beside_sinks() -> None:
    agrees_with_the_reference(Case([100, 3], [160, 9], 2, 2, True, 20, 7, sinks=True))


@pytest.mark.parametrize("scale", [0.25, 8.0])
def test_bfloat16_prefill_keeps_its_scores_in_fp32(scale: float) -> None:
    """At `scale` 8 scores reach a hundred: rounded to bf16 they would be off by a quarter."""
    case = Case([100, 70], [160, 70], 3, 3, True, None, 5)
    tensors = make_tensors(case, torch.bfloat16)
    expected = reference(case, tensors, scale)
    assert paged_attention.NARROW_ROWS < 70
    torch.testing.assert_close(run(case, tensors, scale).double(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "message"),
    [
        ([1, 1], [4], "2 requests"),
        ([5], [4], "5 query rows do not fit 4"),
        ([1], [0], "do not fit 0"),
        ([1], [99], "slot table"),
    ],
)
def test_lengths_that_do_not_fit(q_lens: list[int], kv_lens: list[int], message: str) -> None:
    table = torch.zeros(2, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        PagedAttentionPlan.build(table, q_lens, kv_lens, causal=True, dtype=torch.float32)

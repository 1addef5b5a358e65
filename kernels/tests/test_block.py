"""prepare_mixed_block, fill_slots and accept_and_commit against loops, exactly."""

from itertools import accumulate

import kernel_oracles as oracles
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_backends import DEVICE, examples, guarded_outputs, integers, running
from whiflash_kernels import GraphSlots, MixedBlock, accept_and_commit, fill_slots, prepare_mixed_block

SLOTS, CONTEXT = 300, 96


def slot_table() -> torch.Tensor:
    return torch.randperm(SLOTS * CONTEXT, generator=torch.Generator().manual_seed(5)).view(SLOTS, CONTEXT).int()


def check_round(
    backend: str,
    widths: list[int],
    seed: int,
    *,
    padding: int | None = None,
    dtype: torch.dtype = torch.int64,
    stops: list[list[int]] | None = None,
) -> MixedBlock:
    """Build a block, verify it with predictions that agree with about three drafts in four, commit it.

    `stops`: tokens that end each request, as many each.
    """
    generator = torch.Generator().manual_seed(seed)
    requests, most = len(widths), max([*widths, 1])
    # A narrow alphabet: predictions often agree by chance too.
    bonus = torch.randint(0, 5, (requests,), generator=generator).tolist()
    drafts = torch.randint(0, 5, (requests, most - 1), generator=generator).tolist()
    seq_lens = torch.randint(0, CONTEXT - most, (requests,), generator=generator).tolist()
    slots = torch.randperm(SLOTS, generator=generator)[:requests].tolist()
    table = slot_table()
    rows, indptr = oracles.mixed_block(bonus, drafts, widths, seq_lens, slots, table)
    pad = padding or 0
    with running(backend), guarded_outputs():
        block = prepare_mixed_block(
            integers(bonus),
            integers(drafts).view(requests, most - 1),
            integers(widths, dtype),
            integers(seq_lens, dtype),
            integers(slots, dtype),
            table.to(DEVICE),
            rows=None if padding is None else len(rows) + padding,
        )
    assert block.input_ids.tolist() == [r[0] for r in rows] + [0] * pad
    assert block.positions.tolist() == [r[1] for r in rows] + [0] * pad
    assert block.cache_slots.tolist() == [r[2] for r in rows] + [0] * pad
    assert block.request_of_row.tolist() == [r[3] for r in rows] + [-1] * pad
    assert block.qo_indptr.tolist() == indptr
    assert block.ids_and_requests.tolist() == [block.input_ids.tolist(), block.request_of_row.tolist()]
    assert [t.dtype for t in block] == [torch.int64] * 4 + [torch.int32, torch.int64]

    predictions = torch.randint(0, 5, (len(rows) + pad,), generator=generator)
    agree = torch.rand(len(rows) + pad, generator=generator) < 0.75
    following = block.input_ids.cpu().roll(-1)
    predictions = torch.where(agree, following, predictions)
    committed_tokens = oracles.commit(predictions.tolist(), block.input_ids.tolist(), indptr, most, stops)
    text = torch.full((SLOTS, CONTEXT + most), -5, dtype=torch.int64, device=DEVICE)
    of_slots = torch.full((SLOTS, len(stops[0]) if stops else 2), -1, dtype=torch.int64)
    if stops is not None:
        for slot, ends in zip(slots, stops, strict=True):
            of_slots[slot] = torch.tensor(ends, dtype=torch.int64)
    with running(backend), guarded_outputs():
        committed = accept_and_commit(
            predictions.to(DEVICE),
            block.input_ids,
            block.qo_indptr,
            integers(seq_lens, dtype),
            stride=most,
            request_slots=integers(slots, dtype),
            stops=of_slots.to(DEVICE),
            text=text,
        )
    lengths = [len(tokens) for tokens in committed_tokens]
    padded = [t + [0] * (most - len(t)) for t in committed_tokens]
    assert committed.accept_lens.tolist() == lengths
    assert committed.tokens.tolist() == padded
    assert committed.bonus.tolist() == [t[-1] if t else 0 for t in committed_tokens]
    assert committed.seq_lens.tolist() == [n + k for n, k in zip(seq_lens, lengths, strict=True)]
    assert committed.last_rows.tolist() == [s + max(k - 1, 0) for s, k in zip(indptr, lengths, strict=False)]
    int64, int32 = torch.int64, torch.int32
    assert [t.dtype for t in committed] == [int32, int64, int64, dtype, int64]
    expected = torch.full_like(text, -5)
    for slot, n, tokens in zip(slots, seq_lens, padded, strict=True):
        expected[slot, n + 1 : n + 1 + most] = integers(tokens)
    assert torch.equal(text, expected)
    return block


@settings(max_examples=examples(40), deadline=None)
@given(
    widths=st.lists(st.integers(0, 17), max_size=9),
    seed=st.integers(0, 1000),
    padding=st.one_of(st.none(), st.integers(0, 40)),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@example([], 2, 3, torch.int32)
@example([0], 2, 3, torch.int32)
@example([1, 1, 1], 2, 3, torch.int32)
@example([8, 4, 1, 16], 1, None, torch.int32)
@example([0, 1, 1], 2, 3, torch.int64)
def test_any_round(backend: str, widths: list[int], seed: int, padding: int | None, dtype: torch.dtype) -> None:
    check_round(backend, widths, seed, padding=padding, dtype=dtype)


@settings(max_examples=examples(40), deadline=None)
@given(data=st.data(), widths=st.lists(st.integers(0, 9), max_size=6), seed=st.integers(0, 1000))
def test_any_round_that_may_end(backend: str, data: st.DataObject, widths: list[int], seed: int) -> None:
    """Predictions are of 0…4; -1 means no token."""
    columns = data.draw(st.integers(1, 3))
    ending = st.lists(st.sampled_from([-1, -1, 0, 1, 2]), min_size=columns, max_size=columns)
    stops = [data.draw(ending) for _ in widths]
    check_round(backend, widths, seed, stops=stops, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))


def test_256_requests(backend: str) -> None:
    widths = torch.randint(0, 9, (256,), generator=torch.Generator().manual_seed(6)).tolist()
    check_round(backend, widths, 3, padding=10)


def test_columns_past_a_width_are_not_read(backend: str) -> None:
    """Drafts as a strided slice whose unused columns hold nonsense."""
    wide = torch.full((2, 12), -1, dtype=torch.int64, device=DEVICE)
    wide[0, 3:5], wide[1, 3:7] = integers([11, 12]), integers([21, 22, 23, 24])
    one, drafts = integers([1, 2]), wide[:, 3:9]
    rest = integers([3, 5]), integers([4, 5]), one, slot_table().to(DEVICE)
    with running(backend):
        block = prepare_mixed_block(one, drafts, *rest)
        transposed = prepare_mixed_block(one, drafts.t().contiguous().t(), *rest)
    assert block.input_ids.tolist() == [1, 11, 12, 2, 21, 22, 23, 24]
    assert torch.equal(block.input_ids, transposed.input_ids)


@pytest.mark.parametrize(("stops", "count"), [([-1, -1], 3), ([2, -1], 2), ([-1, 2], 2)])
def test_commit_stops_at_the_stride_or_a_stop(backend: str, stops: list[int], count: int) -> None:
    ids = integers([9, 1, 2, 3, 4])
    with running(backend):
        committed = accept_and_commit(
            integers([1, 2, 3, 4, 5]),
            ids,
            integers([0, 5], torch.int32),
            integers([10]),
            stride=3,
            request_slots=integers([0]),
            stops=integers([stops]),
            text=integers([[0] * 14]),
        )
    assert committed.tokens.tolist() == [[1, 2, 3 * (count == 3)]]
    assert committed.accept_lens.tolist() == [count]
    assert committed.bonus.tolist() == [count]
    assert committed.seq_lens.tolist() == [10 + count]


def graph_slots(count: int) -> GraphSlots:
    """Full of nonsense."""
    wide = torch.full((2, count), -9, dtype=torch.int64, device=DEVICE)
    widths, ends, indptr = (torch.full((n,), -9, dtype=torch.int32, device=DEVICE) for n in (count, count, count + 1))
    return GraphSlots(widths, indptr, wide[0], ends, wide[1].clone())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@settings(max_examples=examples(40), deadline=None)
@given(
    widths=st.lists(st.integers(1, 17), max_size=9),
    spare=st.integers(0, 70),
    padding=st.integers(0, 90),
    seed=st.integers(0, 1000),
)
@example([2, 3], 3, 5, 0)
def test_slots_hold_a_batch_and_what_it_leaves(
    backend: str, dtype: torch.dtype, widths: list[int], spare: int, padding: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths, requests = torch.randint(1, 1000, (2, len(widths)), generator=generator).tolist()
    slots, padding = graph_slots(len(widths) + spare), padding if spare else 0
    batch = (integers(widths, dtype), integers(lengths, dtype), integers(requests, dtype))
    with running(backend):
        fill_slots(*batch, slots, rows=sum(widths) + padding, empty=3)
    more = [padding // spare + (i < padding % spare) for i in range(spare)]
    assert slots.widths.tolist() == [*widths, *more]
    assert slots.qo_indptr.tolist() == [0, *accumulate([*widths, *more])]
    assert slots.seq_lens.tolist() == [*lengths, *[3] * spare]
    assert slots.ends.tolist() == [n + w for n, w in zip([*lengths, *[3] * spare], [*widths, *more], strict=True)]
    assert slots.request_slots.tolist() == [*requests, *[0] * spare]


def test_torch_rejects_more_rows_than_asked_for() -> None:
    one = integers([1])
    with running("torch"), pytest.raises(ValueError, match="raise rows"):
        prepare_mixed_block(one, integers([[2, 3]]), integers([3]), one, one, slot_table().to(DEVICE), rows=2)


def test_rejects_what_does_not_match() -> None:
    one, table = integers([1]), slot_table().to(DEVICE)
    with pytest.raises(ValueError, match=r"drafts must be \[1, D\]"):
        prepare_mixed_block(one, integers([[1], [2]]), one, one, one, table)
    kept = {"request_slots": one, "stops": one[:, None], "text": table}
    with pytest.raises(ValueError, match="must match"):
        accept_and_commit(one, integers([1, 2]), integers([0, 1]), one, stride=1, **kept)
    with pytest.raises(ValueError, match="2 requests exceed the 1 slots"):
        fill_slots(*[integers([1, 2])] * 3, graph_slots(1), rows=3, empty=1)
    with pytest.raises(ValueError, match="stride must be at least 1"):
        accept_and_commit(one, one, integers([0, 1]), one, stride=0, **kept)

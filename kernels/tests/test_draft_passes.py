"""claim_backlogs, draft_inputs and pass_rows against loops, exactly."""

import kernel_oracles as oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import DEVICE, examples, guarded_outputs, integers, running
from whiflash_kernels import BacklogRings, Claims, PassInputs, claim_backlogs, draft_inputs, pass_rows

SLOTS, CONTEXT, CAPACITY = 12, 40, 7

dtypes = st.sampled_from([torch.int32, torch.int64])
spares = st.none() | st.integers(0, 3)
"""Requests that a captured pass reads beyond the batch; None: nothing is captured."""
OLD = 77
"""A captured pass read this before."""


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@settings(max_examples=examples(40), deadline=None)
@given(
    arms=st.integers(1, 3),
    slots=st.lists(st.integers(0, SLOTS - 1), unique=True, max_size=SLOTS),
    seed=st.integers(0, 1000),
    dtype=dtypes,
    spare=spares,
)
def test_any_claim(backend: str, arms: int, slots: list[int], seed: int, dtype: torch.dtype, spare: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    watermarks = torch.randint(0, CONTEXT, (arms, SLOTS), generator=generator)
    lengths = torch.randint(1, CONTEXT, (len(slots),), generator=generator).tolist()
    due = torch.randint(0, 2, (arms, len(slots)), generator=generator)
    expected = watermarks.tolist()
    begins, ends = oracles.claim(expected, slots, lengths, due.tolist())
    marks, into = watermarks.to(DEVICE), None
    if spare is not None:
        size = len(slots) + spare
        into = Claims(*(integers([OLD]).expand(shape).clone() for shape in (size, (arms, size), (arms, size))))
    batch = integers(slots, dtype), integers(lengths, dtype), due.to(DEVICE, dtype)
    with running(backend), guarded_outputs():
        found = claim_backlogs(marks, *batch, into=into)
    assert [t.tolist() for t in found] == [slots, begins, ends]
    assert marks.tolist() == expected
    assert found.begins.dtype == found.ends.dtype == torch.int64
    if into is not None:
        assert list(map(memory, found)) == list(map(memory, into))
        assert not any(place[..., len(slots) :].any() for place in into)


def test_more_claims_than_a_program_takes(backend: str) -> None:
    marks = torch.zeros(2, 256, dtype=torch.int64, device=DEVICE)
    slots = torch.arange(256, device=DEVICE).flip(0)
    due = torch.stack([slots % 2, torch.ones_like(slots)])
    with running(backend), guarded_outputs():
        _, begins, ends = claim_backlogs(marks, slots, slots + 1, due)
    assert torch.equal(begins, torch.zeros_like(begins))
    assert torch.equal(ends, (slots + 1) * due)
    assert torch.equal(marks, ends.flip(1))


@settings(max_examples=examples(40), deadline=None)
@given(data=st.data(), requests=st.integers(1, 9), seed=st.integers(0, 1000), dtype=dtypes, spare=spares)
def test_any_members(
    backend: str, data: st.DataObject, requests: int, seed: int, dtype: torch.dtype, spare: int | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(SLOTS, CAPACITY, 24, generator=generator).to(DEVICE)
    rings = BacklogRings(features, torch.zeros(SLOTS, CAPACITY, dtype=torch.int64, device=DEVICE))
    slots = torch.randperm(SLOTS, generator=generator)[:requests].tolist()
    lengths, bonus, limits = (torch.randint(1, CONTEXT, (requests,), generator=generator).tolist() for _ in range(3))
    members = data.draw(st.none() | st.lists(st.integers(0, requests - 1), unique=True))
    chunks = data.draw(st.sampled_from([None, (), (2, 0), (1,)]))
    columns = list(range(24)) if chunks is None else [c * 8 + i for c in chunks for i in range(8)]
    calibration = torch.rand(5, generator=generator).to(DEVICE)
    chosen, into = range(requests) if members is None else members, None
    if spare is not None:
        size = max(len(chosen) + spare, 1)
        tail = features.new_full((size, len(columns)), OLD)
        numbers = [integers([OLD]).expand(size).clone() for _ in range(4)]
        into = PassInputs(*numbers, tail, torch.full_like(calibration, OLD))
    with running(backend), guarded_outputs():
        *found, tails, judged = draft_inputs(
            rings,
            None if members is None else integers(members, dtype),
            *(integers(values, dtype) for values in (slots, lengths, bonus, limits)),
            calibration,
            chunks=chunks,
            chunk_width=8,
            into=into,
            padding=-9,
        )
    numbers = [[values[b] for b in chosen] for values in (slots, lengths, bonus, limits)]
    assert [t.tolist() for t in found] == numbers
    assert all(t.dtype == torch.int64 for t in found)
    assert torch.equal(judged, calibration)
    assert tails.shape == (len(chosen), len(columns))
    for tail, b in zip(tails, chosen, strict=True):
        assert torch.equal(tail, features[slots[b], (lengths[b] - 1) % CAPACITY][columns])
    if into is not None:
        assert list(map(memory, (*found, tails, judged))) == list(map(memory, into))
        padding = [place[len(chosen) :].tolist() for place in into[:4]]
        assert padding == [[value] * (len(into.tail) - len(chosen)) for value in (0, -9, 0, 0)]
        assert (into.tail[len(chosen) :] == OLD).all()


def test_a_wide_feature_is_whole(backend: str) -> None:
    features = torch.randn(2, 3, 5000, device=DEVICE)
    rings = BacklogRings(features, torch.zeros(2, 3, dtype=torch.int64, device=DEVICE))
    one = integers([1])
    with running(backend), guarded_outputs():
        batch = one, one * 5, one, one, features[0, 0]
        whole = draft_inputs(rings, one * 0, *batch)
        half = draft_inputs(rings, None, *batch, chunks=(1,), chunk_width=2500)
    assert torch.equal(whole.tail[0], features[1, 1])
    assert torch.equal(half.tail[0], features[1, 1, 2500:])


@settings(max_examples=examples(40), deadline=None)
@given(
    lengths=st.lists(st.integers(-9, CONTEXT - 8), max_size=6),
    offset=st.integers(-1, 1),
    width=st.integers(1, 7),
    fill=st.none() | st.integers(0, 9),
    dtype=dtypes,
)
def test_any_pass(
    backend: str, lengths: list[int], offset: int, width: int, fill: int | None, dtype: torch.dtype
) -> None:
    table = torch.randperm(SLOTS * CONTEXT, generator=torch.Generator().manual_seed(1)).view(SLOTS, CONTEXT).int()
    slots = list(range(len(lengths), 0, -1))
    with running(backend), guarded_outputs():
        places, cache_slots, ids = pass_rows(
            table.to(DEVICE),
            integers(slots, dtype),
            integers(lengths),
            integers([100 + n for n in lengths], dtype),
            offset=offset,
            width=width,
            fill=fill,
        )
    positions = [[n + offset + i for i in range(width)] for n in lengths]
    assert places.tolist() == [[max(p, 0) for p in own] for own in positions]
    assert cache_slots.tolist() == [
        [int(table[slot, p]) if p >= 0 else 0 for p in own] for slot, own in zip(slots, positions, strict=True)
    ]
    if fill is None:
        assert ids is None
    else:
        assert ids is not None
        assert ids.tolist() == [[100 + n, *[fill] * (width - 1)] for n in lengths]


def test_rejects_what_does_not_fit_a_pass() -> None:
    one, table = integers([1]), torch.zeros(SLOTS, CONTEXT, dtype=torch.int32, device=DEVICE)
    rings = BacklogRings.allocate(SLOTS, CAPACITY, 24, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match=r"due must be \(2, 1\)"):
        claim_backlogs(torch.zeros(2, SLOTS, dtype=torch.int64, device=DEVICE), one, one, one)
    with pytest.raises(ValueError, match="do not fit"):
        draft_inputs(rings, *[one] * 6, chunks=(3,), chunk_width=8)
    nothing = one[:0]
    with pytest.raises(ValueError, match="exceed the 0 that a pass reads"):
        draft_inputs(rings, None, *[one] * 5, into=PassInputs(*[nothing] * 6))
    with pytest.raises(ValueError, match="exceed the 0 of a pass"):
        claim_backlogs(one[None], *[one] * 2, one[None], into=Claims(*[nothing] * 3))
    with pytest.raises(ValueError, match="width must be at least 1"):
        pass_rows(table, one, one, one, offset=0, width=0)

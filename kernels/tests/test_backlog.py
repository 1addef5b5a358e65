"""park and unpark against loops, exactly: both only copy."""

from dataclasses import dataclass

import kernel_oracles as oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import BACKENDS, DEVICE, examples, guarded_outputs, integers, running
from whiflash_kernels import BacklogRings, park, unpark

SENTINEL = -77


@dataclass(frozen=True)
class Ragged:
    """A batch in plain numbers: parallel lists, one entry for each request."""

    slots: list[int]
    begins: list[int]
    lengths: list[int]


@st.composite
def batches(draw: st.DrawFn, longest: int) -> Ragged:
    slots = draw(st.lists(st.integers(0, 9), unique=True, max_size=6))
    return Ragged(slots, [draw(st.integers(0, 40)) for _ in slots], [draw(st.integers(0, longest)) for _ in slots])


def sentinel_rings(slots: int, capacity: int, width: int, dtype: torch.dtype = torch.bfloat16) -> BacklogRings:
    return BacklogRings(
        features=torch.full((slots, capacity, width), SENTINEL, dtype=dtype, device=DEVICE),
        next_tokens=torch.full((slots, capacity), SENTINEL, dtype=torch.int64, device=DEVICE),
    )


def filled_rings(slots: int, capacity: int, width: int) -> BacklogRings:
    generator = torch.Generator().manual_seed(slots * 1000 + width)
    return BacklogRings(
        features=torch.randn(slots, capacity, width, generator=generator).bfloat16().to(DEVICE),
        next_tokens=torch.randint(0, 50_000, (slots, capacity), generator=generator).to(DEVICE),
    )


def check_park(backend: str, batch: Ragged, capacity: int, width: int, index: torch.dtype) -> None:
    # Requests own more rows than they commit, as after a verification: the rest must stay unread.
    owned = [length + 2 for length in batch.lengths]
    starts = [sum(owned[:b]) for b in range(len(owned))]
    total = sum(owned)
    features = torch.randn(total, width, generator=torch.Generator().manual_seed(total)).bfloat16()
    next_tokens = torch.arange(1000, 1000 + total)
    rings = sentinel_rings(10, capacity, width)
    expected = sentinel_rings(10, capacity, width)
    ring, ring_tokens = expected.features.cpu(), expected.next_tokens.cpu()
    oracles.park(ring, ring_tokens, features, next_tokens, batch.slots, batch.begins, batch.lengths, starts)
    with running(backend):
        park(
            rings,
            features.to(DEVICE),
            next_tokens.to(DEVICE),
            integers(batch.slots, index),
            integers(batch.begins, index),
            integers(batch.lengths, torch.int32),
            integers(starts, torch.int32),
            max_length=max(batch.lengths, default=0) + 3,
        )
    assert torch.equal(rings.features.cpu(), ring)
    assert torch.equal(rings.next_tokens.cpu(), ring_tokens)


@settings(max_examples=examples(25), deadline=None)
@given(batch=batches(longest=12), capacity=st.integers(1, 9), width=st.sampled_from([1, 8, 33]))
def test_park_any_batch(backend: str, batch: Ragged, capacity: int, width: int) -> None:
    check_park(backend, batch, capacity, width, torch.int64)


@pytest.mark.parametrize("width", [1, 7, 2048, 5000])
def test_park_widths(backend: str, width: int) -> None:
    check_park(backend, Ragged([3], [14], [5]), 16, width, torch.int32)


def test_park_256_requests_of_strided_features(backend: str) -> None:
    wide = torch.randn(512, 40, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    rings = sentinel_rings(300, 4, 24)
    slots = torch.arange(299, 43, -1, device=DEVICE)
    with running(backend):
        park(
            rings,
            wide[:, 8:32],
            torch.arange(512, device=DEVICE),
            slots,
            torch.full((256,), 6, device=DEVICE),
            torch.ones(256, dtype=torch.int32, device=DEVICE),
            torch.arange(0, 512, 2, device=DEVICE),
            max_length=2,
        )
    assert torch.equal(rings.features[slots, 2], wide[::2, 8:32])
    assert torch.equal(rings.next_tokens[slots, 2], torch.arange(0, 512, 2, device=DEVICE))
    assert (rings.features[:, [0, 1, 3]] == SENTINEL).all()
    assert (rings.features[:44] == SENTINEL).all()


def test_rings_that_are_a_part_of_wider_ones(backend: str) -> None:
    wide = torch.full((2, 8, 40), SENTINEL, dtype=torch.bfloat16, device=DEVICE)
    rings = BacklogRings(wide[..., 8:32], torch.full((2, 8), SENTINEL, dtype=torch.int64, device=DEVICE))
    features = torch.randn(3, 24, generator=torch.Generator().manual_seed(4)).bfloat16().to(DEVICE)
    one, table = integers([1]), torch.arange(32, dtype=torch.int32, device=DEVICE).view(2, 16)
    with running(backend):
        park(rings, features, integers([1, 2, 3]), one, integers([6]), integers([3]), integers([0]))
        unparked, *_ = unpark(rings, one, integers([6]), integers([9]), table, rows=3)
    assert torch.equal(wide[1, [6, 7, 0], 8:32], features)
    assert (wide[..., :8] == SENTINEL).all()
    assert (wide[..., 32:] == SENTINEL).all()
    assert torch.equal(unparked, features)


def test_park_rejects_features_that_do_not_fit() -> None:
    rings, one = sentinel_rings(2, 4, 8), integers([1])
    for features in (torch.zeros(3, 7).bfloat16(), torch.zeros(3, 8)):
        with pytest.raises(ValueError, match="to fit the rings"):
            park(rings, features.to(DEVICE), integers([0, 0, 0]), one, one, one, one)


def check_unpark(backend: str, batch: Ragged, capacity: int, *, padding: int, index: torch.dtype) -> None:
    width, chunks = 24, (2, 0)
    rings = filled_rings(10, capacity, width)
    lengths = [min(length, capacity) for length in batch.lengths]
    ends = [begin + length for begin, length in zip(batch.begins, lengths, strict=True)]
    req_to_token = torch.randperm(10 * 64, generator=torch.Generator().manual_seed(3)).view(10, 64).int()
    columns = [c * 8 + i for c in chunks for i in range(8)]
    for chosen, picked in ((None, list(range(width))), (chunks, columns)):
        rows = oracles.unpark(
            rings.features.cpu(), rings.next_tokens, batch.slots, batch.begins, ends, req_to_token, picked
        )
        with running(backend), guarded_outputs():
            features, tokens, positions, cache_slots, request_of_row = unpark(
                rings,
                integers(batch.slots, index),
                integers(batch.begins, index),
                integers(ends, index),
                req_to_token.to(DEVICE),
                rows=len(rows) + padding,
                chunks=chosen,
                chunk_width=8,
            )
        assert tokens.tolist() == [r[1] for r in rows] + [0] * padding
        assert positions.tolist() == [r[2] for r in rows] + [0] * padding
        assert cache_slots.tolist() == [r[3] for r in rows] + [-1] * padding
        assert request_of_row.tolist() == [r[4] for r in rows] + [-1] * padding
        expected = torch.zeros(len(rows) + padding, len(picked), dtype=torch.bfloat16)
        for i, row in enumerate(rows):
            expected[i] = row[0]
        assert torch.equal(features.cpu(), expected)


@settings(max_examples=examples(20), deadline=None)
@given(batch=batches(longest=7), capacity=st.integers(1, 9), padding=st.integers(0, 3))
def test_unpark_any_batch(backend: str, batch: Ragged, capacity: int, padding: int) -> None:
    check_unpark(backend, batch, capacity, padding=padding, index=torch.int64)


@pytest.mark.parametrize("padding", [0, 5])
def test_unpark_one_request_and_none(backend: str, padding: int) -> None:
    check_unpark(backend, Ragged([4], [13], [16]), 16, padding=padding, index=torch.int32)
    check_unpark(backend, Ragged([], [], []), 16, padding=padding, index=torch.int32)


def test_unpark_256_requests(backend: str) -> None:
    rings = filled_rings(256, 4, 3)
    slots = torch.randperm(256, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    lengths = (slots % 3).to(torch.int32)
    begins = torch.full((256,), 9, dtype=torch.int32, device=DEVICE)
    req_to_token = torch.arange(256 * 16, dtype=torch.int32, device=DEVICE).view(256, 16)
    with running(backend), guarded_outputs():
        features, _, positions, cache_slots, request_of_row = unpark(
            rings, slots, begins, begins + lengths, req_to_token, rows=int(lengths.sum())
        )
    owner = torch.repeat_interleave(lengths.long())
    assert torch.equal(request_of_row, owner)
    assert torch.equal(cache_slots, slots[owner] * 16 + positions)
    assert torch.equal(features, rings.features[slots[owner], positions % 4])


def test_a_begin_past_the_end_is_an_empty_backlog(backend: str) -> None:
    table = torch.arange(64, dtype=torch.int32, device=DEVICE).view(4, 16)
    with running(backend):
        *_, request_of_row = unpark(
            filled_rings(4, 8, 8), integers([1, 2]), integers([9, 3]), integers([5, 4]), table, rows=2
        )
    assert request_of_row.tolist() == [1, -1]


def test_unpark_rejects_chunks_outside_the_features() -> None:
    rings, one = filled_rings(2, 4, 24), integers([1])
    table = torch.zeros(2, 8, dtype=torch.int32, device=DEVICE)
    for chunks, width in (((3,), 8), ((0,), 7), ((0,), 0)):
        with pytest.raises(ValueError, match="do not fit features of width 24"):
            unpark(rings, one, one, one, table, rows=1, chunks=chunks, chunk_width=width)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("backend", ["triton"])
def test_more_rows_than_asked_for_are_left_out(backend: str) -> None:
    table = torch.zeros(2, 8, dtype=torch.int32, device=DEVICE)
    with running(backend), guarded_outputs():
        _, _, positions, *_ = unpark(filled_rings(2, 4, 8), integers([1]), integers([0]), integers([3]), table, rows=2)
    assert positions.tolist() == [0, 1]


def test_torch_rejects_more_rows_than_asked_for() -> None:
    table = torch.zeros(2, 8, dtype=torch.int32, device=DEVICE)
    with running("torch"), pytest.raises(ValueError, match="raise rows"):
        unpark(filled_rings(2, 4, 8), integers([1]), integers([0]), integers([3]), table, rows=2)


def test_rings_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="next_tokens"):
        BacklogRings(torch.zeros(2, 4, 8), torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="contiguous last dimension"):
        BacklogRings(torch.zeros(2, 8, 4).transpose(1, 2), torch.zeros(2, 4, dtype=torch.int64))

# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Kernels that park and unpark features: ragged row copies whose indices never leave the registers."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.structs import BacklogRings, Claims
from whiflash_kernels.triton_kernels.launch import FEWEST_LANES, power_of_two

COLUMNS = 2048
CLAIMS = 128
"""Number of backlogs that one program claims."""


@triton.jit(do_not_specialize=["max_length"])
def _park_kernel(
    ring,
    ring_tokens,
    features,
    next_tokens,
    request_slots,
    begins,
    lengths,
    row_starts,
    capacity,
    width,
    slot_stride,
    position_stride,
    feature_stride,
    max_length,
    COLUMNS: tl.constexpr,
):
    request = tl.program_id(0) // max_length
    inside = tl.program_id(0) % max_length
    length = tl.load(lengths + request)
    # A run longer than the ring would write a place twice, in undefined order, so its head is left out.
    if (inside >= length) | (inside < length - capacity):
        return
    slot = tl.load(request_slots + request).to(tl.int64)
    place = (tl.load(begins + request) + inside) % capacity
    source = tl.load(row_starts + request).to(tl.int64) + inside
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(features + source * feature_stride + column, mask=column < width)
    tl.store(ring + slot * slot_stride + place * position_stride + column, values, mask=column < width)
    if tl.program_id(1) == 0:
        tl.store(ring_tokens + slot * capacity + place, tl.load(next_tokens + source))


def park(
    rings: BacklogRings,
    features: Tensor,
    next_tokens: Tensor,
    request_slots: Tensor,
    begins: Tensor,
    lengths: Tensor,
    row_starts: Tensor,
    *,
    max_length: int | None = None,
) -> None:
    """Scatter the committed rows of a forward into the backlog rings; see `whiflash_kernels.backlog.park`."""
    requests, width = request_slots.shape[0], features.shape[1]
    max_length = features.shape[0] if max_length is None else max_length
    if requests == 0 or max_length == 0:
        return
    features = features if features.stride(1) == 1 else features.contiguous()
    columns = min(COLUMNS, power_of_two(width))
    _park_kernel[(requests * max_length, triton.cdiv(width, columns))](
        rings.features,
        rings.next_tokens,
        features,
        next_tokens.contiguous(),
        request_slots.contiguous(),
        begins.contiguous(),
        lengths.contiguous(),
        row_starts.contiguous(),
        rings.capacity,
        width,
        rings.features.stride(0),
        rings.features.stride(1),
        features.stride(0),
        max_length,
        COLUMNS=columns,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["requests"], do_not_specialize_on_alignment=["request_slots", "begins", "ends"])
def _unpark_kernel(
    ring,
    ring_tokens,
    request_slots,
    begins,
    ends,
    req_to_token,
    features,
    next_tokens,
    positions,
    cache_slots,
    request_of_row,
    requests,
    capacity,
    chunk_width,
    blocks_per_chunk,
    slot_stride,
    position_stride,
    table_stride,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    owner = 0
    before = 0
    total = tl.full([], 0, tl.int32)
    # Requests are read a few at a time, so that one compiled kernel serves any number of them.
    for first in range(0, requests, LANES):
        request = first + tl.arange(0, LANES)
        known = request < requests
        lengths = tl.load(ends + request, mask=known, other=0) - tl.load(begins + request, mask=known, other=0)
        lengths = tl.maximum(lengths, 0).to(tl.int32)
        passed = known & (total + tl.cumsum(lengths, axis=0) <= row)
        owner += tl.sum(passed.to(tl.int32), axis=0)
        before += tl.sum(tl.where(passed, lengths, 0), axis=0)
        total += tl.sum(lengths, axis=0)
    used = row < total
    inside = row - before
    position = tl.load(begins + owner, mask=used, other=0).to(tl.int64) + tl.where(used, inside, 0)
    slot = tl.load(request_slots + owner, mask=used, other=0).to(tl.int64)
    place = position % capacity

    chunk = tl.program_id(1) // blocks_per_chunk
    column = tl.program_id(1) % blocks_per_chunk * COLUMNS + tl.arange(0, COLUMNS)
    source_chunk = chunk
    for i in tl.static_range(len(CHUNKS)):
        source_chunk = tl.where(chunk == i, CHUNKS[i], source_chunk)
    inside_chunk = column < chunk_width
    source = ring + slot * slot_stride + place * position_stride + source_chunk * chunk_width + column
    values = tl.load(source, mask=inside_chunk & used, other=0.0)
    out_width = tl.num_programs(1) // blocks_per_chunk * chunk_width
    target = features + row.to(tl.int64) * out_width + chunk * chunk_width + column
    tl.store(target, values, mask=inside_chunk)
    if tl.program_id(1) == 0:
        token = tl.load(ring_tokens + slot * capacity + place, mask=used, other=0)
        cache_slot = tl.load(req_to_token + slot * table_stride + position, mask=used, other=-1)
        tl.store(next_tokens + row, token)
        tl.store(positions + row, position)
        tl.store(cache_slots + row, cache_slot.to(tl.int64))
        tl.store(request_of_row + row, tl.where(used, owner, -1).to(tl.int64))


def unpark(
    rings: BacklogRings,
    request_slots: Tensor,
    begins: Tensor,
    ends: Tensor,
    req_to_token: Tensor,
    *,
    rows: int,
    chunks: Sequence[int] | None = None,
    chunk_width: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gather ragged backlogs into one packed batch; see `whiflash_kernels.backlog.unpark`."""
    if chunks is None:
        chunks, chunk_width = (0,), rings.features.shape[2]
    device, requests = rings.features.device, request_slots.shape[0]
    features = torch.empty(rows, len(chunks) * chunk_width, dtype=rings.features.dtype, device=device)
    tokens, positions, cache_slots, request_of_row = (
        torch.empty(rows, dtype=torch.int64, device=device) for _ in range(4)
    )
    packed = features, tokens, positions, cache_slots, request_of_row
    if not rows:
        return packed
    columns = min(COLUMNS, power_of_two(chunk_width))
    blocks_per_chunk = triton.cdiv(chunk_width, columns)
    _unpark_kernel[(rows, len(chunks) * blocks_per_chunk)](
        rings.features,
        rings.next_tokens,
        request_slots.contiguous(),
        begins.contiguous(),
        ends.contiguous(),
        req_to_token,
        *packed,
        requests,
        rings.capacity,
        chunk_width,
        blocks_per_chunk,
        rings.features.stride(0),
        rings.features.stride(1),
        req_to_token.stride(0),
        CHUNKS=tuple(chunks),
        LANES=FEWEST_LANES,
        COLUMNS=columns,
        num_warps=4,
    )
    return packed


@triton.jit(do_not_specialize=["requests", "width", "backlogs"])
def _claim_kernel(
    watermarks,
    request_slots,
    seq_lens,
    due,
    out_slots,
    begins,
    ends,
    requests,
    width,
    backlogs,
    slots,
    IN_PLACE: tl.constexpr,
    CLAIMS: tl.constexpr,
):
    index = tl.program_id(0) * CLAIMS + tl.arange(0, CLAIMS)
    inside = index < backlogs
    request = index % width
    arm = (index // width).to(tl.int64)
    known = inside & (request < requests)
    slot = tl.load(request_slots + request, mask=known, other=0).to(tl.int64)
    place = watermarks + arm * slots + slot
    begin = tl.load(place, mask=known, other=0)
    length = tl.load(seq_lens + request, mask=known, other=0).to(tl.int64)
    is_due = tl.load(due + arm * requests + request, mask=known, other=0) != 0
    end = tl.where(is_due, tl.maximum(begin, length), begin)
    tl.store(begins + index, begin, mask=inside)
    tl.store(ends + index, end, mask=inside)
    tl.store(place, end, mask=known)
    if IN_PLACE:
        tl.store(out_slots + request, slot, mask=inside & (arm == 0))


def claim_backlogs(
    watermarks: Tensor, request_slots: Tensor, seq_lens: Tensor, due: Tensor, *, into: Claims | None = None
) -> Claims:
    """Return the backlog positions that each drafter must ingest; see `whiflash_kernels.backlog.claim_backlogs`."""
    arms, requests = due.shape
    request_slots = request_slots.contiguous()
    claims = into
    if claims is None:
        both = (torch.empty(arms, requests, dtype=torch.int64, device=due.device) for _ in range(2))
        claims = Claims(request_slots, *both)
    width = claims.begins.shape[1]
    if arms * width:
        _claim_kernel[(triton.cdiv(arms * width, CLAIMS),)](
            watermarks,
            request_slots,
            seq_lens.contiguous(),
            due.contiguous(),
            *claims,
            requests,
            width,
            arms * width,
            watermarks.shape[1],
            IN_PLACE=into is not None,
            CLAIMS=CLAIMS,
            num_warps=4,
        )
    return claims if into is None else Claims(*(target[..., :requests] for target in claims))

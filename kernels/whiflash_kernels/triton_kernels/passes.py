# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Kernels that gather a draft pass's inputs and compute its rows, one launch each."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.structs import BacklogRings, PassInputs
from whiflash_kernels.triton_kernels.launch import power_of_two

COLUMNS = 2048


@triton.jit(do_not_specialize=["count", "padding", "bins"], do_not_specialize_on_alignment=["calibration"])
def _inputs_kernel(
    ring,
    members,
    request_slots,
    seq_lens,
    bonus,
    limits,
    calibration,
    out_slots,
    out_lens,
    out_bonus,
    out_limits,
    tail,
    out_calibration,
    capacity,
    chunk_width,
    blocks_per_chunk,
    slot_stride,
    position_stride,
    count,
    padding,
    bins,
    BINS: tl.constexpr,
    HAS_MEMBERS: tl.constexpr,
    STORES: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    member = tl.program_id(0)
    known = member < count
    request = member.to(tl.int64)
    if HAS_MEMBERS:
        request = tl.load(members + member, mask=known, other=0).to(tl.int64)
    slot = tl.load(request_slots + request, mask=known, other=0).to(tl.int64)
    length = tl.load(seq_lens + request, mask=known, other=0).to(tl.int64)
    if STORES and tl.program_id(1) == 0:
        tl.store(out_slots + member, slot)
        tl.store(out_lens + member, tl.where(known, length, padding))
        tl.store(out_bonus + member, tl.load(bonus + request, mask=known, other=0).to(tl.int64))
        tl.store(out_limits + member, tl.load(limits + request, mask=known, other=0).to(tl.int64))
    if BINS > 0:
        place = tl.arange(0, BINS)
        once = (place < bins) & (member == 0) & (tl.program_id(1) == 0)
        tl.store(out_calibration + place, tl.load(calibration + place, mask=once), mask=once)
    if len(CHUNKS) > 0:
        chunk = tl.program_id(1) // blocks_per_chunk
        column = tl.program_id(1) % blocks_per_chunk * COLUMNS + tl.arange(0, COLUMNS)
        source_chunk = chunk
        for i in tl.static_range(len(CHUNKS)):
            source_chunk = tl.where(chunk == i, CHUNKS[i], source_chunk)
        source = ring + slot * slot_stride + (length - 1) % capacity * position_stride
        inside = known & (column < chunk_width)
        values = tl.load(source + source_chunk * chunk_width + column, mask=inside)
        target = tail + (member.to(tl.int64) * len(CHUNKS) + chunk) * chunk_width
        tl.store(target + column, values, mask=inside)


def draft_inputs(
    rings: BacklogRings,
    members: Tensor | None,
    request_slots: Tensor,
    seq_lens: Tensor,
    bonus: Tensor,
    limits: Tensor,
    calibration: Tensor,
    *,
    chunks: Sequence[int] | None = None,
    chunk_width: int = 0,
    into: PassInputs | None = None,
    padding: int = 0,
) -> PassInputs:
    """Gather one drafter's requests, each with its newest feature; see `whiflash_kernels.passes.draft_inputs`."""
    if chunks is None:
        chunks, chunk_width = (0,), rings.features.shape[2]
    batch = [t.long().contiguous() for t in (request_slots, seq_lens, bonus, limits)]
    count, device = (request_slots if members is None else members).shape[0], request_slots.device
    inputs = into
    if inputs is None:
        numbers = batch if members is None else [torch.empty(count, dtype=torch.int64, device=device) for _ in range(4)]
        tail = torch.empty(count, len(chunks) * chunk_width, dtype=rings.features.dtype, device=device)
        inputs = PassInputs._make([*numbers, tail, calibration])
    requests, stores = len(inputs.bonus), members is not None or into is not None
    columns = min(COLUMNS, power_of_two(chunk_width))
    blocks_per_chunk = triton.cdiv(chunk_width, columns)
    if requests and (stores or chunks):
        _inputs_kernel[(requests, max(len(chunks) * blocks_per_chunk, 1))](
            rings.features,
            batch[0] if members is None else members.contiguous(),
            *batch,
            calibration,
            *inputs,
            rings.capacity,
            chunk_width,
            blocks_per_chunk,
            rings.features.stride(0),
            rings.features.stride(1),
            count,
            padding,
            len(calibration),
            BINS=0 if into is None else power_of_two(len(calibration)),
            HAS_MEMBERS=members is not None,
            STORES=stores,
            CHUNKS=tuple(chunks),
            COLUMNS=columns,
            num_warps=4,
        )
    if into is None:
        return inputs
    return PassInputs._make([*(target[:count] for target in into[:-1]), into.calibration])


@triton.jit(do_not_specialize=["offset", "width", "fill"])
def _pass_rows_kernel(
    req_to_token,
    request_slots,
    seq_lens,
    bonus,
    positions,
    cache_slots,
    input_ids,
    offset,
    width,
    fill,
    table_stride,
    COLUMNS: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    request = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    slot = tl.load(request_slots + request).to(tl.int64)
    position = tl.load(seq_lens + request).to(tl.int64) + offset + column
    cache_slot = tl.load(req_to_token + slot * table_stride + position, mask=inside & (position >= 0), other=0).to(
        tl.int64
    )
    at = request.to(tl.int64) * width + column
    tl.store(positions + at, tl.maximum(position, 0), mask=inside)
    tl.store(cache_slots + at, cache_slot, mask=inside)
    if HAS_IDS:
        token = tl.load(bonus + request).to(tl.int64)
        tl.store(input_ids + at, tl.where(column == 0, token, fill), mask=inside)


def pass_rows(
    req_to_token: Tensor,
    request_slots: Tensor,
    seq_lens: Tensor,
    bonus: Tensor,
    *,
    offset: int,
    width: int,
    fill: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return positions, KV slots and token ids of a draft pass; see `whiflash_kernels.passes.pass_rows`."""
    requests, device = request_slots.shape[0], request_slots.device
    positions = torch.empty(requests, width, dtype=torch.int64, device=device)
    slots = torch.empty(requests, width, dtype=torch.int64, device=device)
    ids = None if fill is None else torch.empty(requests, width, dtype=torch.int64, device=device)
    if requests:
        _pass_rows_kernel[(requests,)](
            req_to_token,
            request_slots.contiguous(),
            seq_lens.contiguous(),
            bonus.contiguous(),
            positions,
            slots,
            positions if ids is None else ids,
            offset,
            width,
            0 if fill is None else fill,
            req_to_token.stride(0),
            COLUMNS=power_of_two(width),
            HAS_IDS=fill is not None,
            num_warps=1,
        )
    return positions, slots, ids

# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Kernels that pack and commit verifications with a width per request, one launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.structs import Committed, GraphSlots, MixedBlock
from whiflash_kernels.triton_kernels.launch import draft_columns, lanes

COMPARISONS = 4096
"""Most entries of the row-by-request comparison in a program: 32 for each of its 128 threads."""

MAX_REQUESTS = 4096


@triton.jit(do_not_specialize=["requests", "rows", "drafts_stride"])
def _prepare_kernel(
    bonus,
    drafts,
    widths,
    seq_lens,
    request_slots,
    req_to_token,
    input_ids,
    positions,
    cache_slots,
    request_of_row,
    qo_indptr,
    requests,
    rows,
    drafts_stride,
    table_stride,
    REQUESTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    request = tl.arange(0, REQUESTS)
    width = tl.load(widths + request, mask=request < requests, other=0).to(tl.int32)
    ends = tl.cumsum(width, axis=0)
    if tl.program_id(0) == 0:
        tl.store(qo_indptr, 0)
        tl.store(qo_indptr + 1 + request, ends, mask=request < requests)

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    owner = tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), axis=1)
    start = tl.sum(tl.where(request[None, :] < owner[:, None], width[None, :], 0), axis=1)
    inside = row < rows
    # For rows after the last request the count of smaller ends includes the unused lanes of the block.
    used = inside & (row < tl.sum(width, axis=0))
    offset = row - start
    bonus_token = tl.load(bonus + owner, mask=used, other=0)
    draft_token = tl.load(drafts + owner.to(tl.int64) * drafts_stride + offset - 1, mask=used & (offset > 0), other=0)
    position = tl.load(seq_lens + owner, mask=used, other=0).to(tl.int64) + tl.where(used, offset, 0)
    slot = tl.load(request_slots + owner, mask=used, other=0).to(tl.int64)
    cache_slot = tl.load(req_to_token + slot * table_stride + position, mask=used, other=0).to(tl.int64)
    tl.store(input_ids + row, tl.where(used & (offset > 0), draft_token, bonus_token), mask=inside)
    tl.store(positions + row, position, mask=inside)
    tl.store(cache_slots + row, cache_slot, mask=inside)
    tl.store(request_of_row + row, tl.where(used, owner, -1).to(tl.int64), mask=inside)


def prepare_mixed_block(
    bonus: Tensor,
    drafts: Tensor,
    widths: Tensor,
    seq_lens: Tensor,
    request_slots: Tensor,
    req_to_token: Tensor,
    *,
    rows: int | None = None,
) -> MixedBlock:
    """Pack a verification's token ids, positions and KV slots; see `whiflash_kernels.block.prepare_mixed_block`."""
    requests, device = bonus.shape[0], bonus.device
    if requests > MAX_REQUESTS:
        raise ValueError(f"a batch of {requests} requests exceeds the kernel's {MAX_REQUESTS}: split it")
    if rows is None:
        rows = int(widths.sum())
    both = torch.empty((2, rows + rows % 2), dtype=torch.int64, device=device)  # each begins at 16 bytes
    block = MixedBlock(
        input_ids=both[0, :rows],
        positions=torch.empty(rows, dtype=torch.int64, device=device),
        cache_slots=torch.empty(rows, dtype=torch.int64, device=device),
        request_of_row=both[1, :rows],
        qo_indptr=torch.empty(requests + 1, dtype=torch.int32, device=device),
        ids_and_requests=both[:, :rows],
    )
    compared = lanes(requests)
    rows_per_program = COMPARISONS // compared
    drafts = drafts if drafts.stride(1) == 1 else drafts.contiguous()
    # One program at least, so that qo_indptr is written even when there are no rows.
    _prepare_kernel[(max(triton.cdiv(rows, rows_per_program), 1),)](
        bonus.contiguous(),
        drafts,
        widths.contiguous(),
        seq_lens.contiguous(),
        request_slots.contiguous(),
        req_to_token,
        *block[:5],
        requests,
        rows,
        drafts.stride(0),
        req_to_token.stride(0),
        REQUESTS=compared,
        ROWS=rows_per_program,
        num_warps=4,
    )
    return block


@triton.jit(do_not_specialize=["requests", "count", "rows", "empty"])
def _slots_kernel(
    widths,
    seq_lens,
    request_slots,
    slot_widths,
    slot_indptr,
    slot_lens,
    slot_ends,
    slot_requests,
    requests,
    count,
    rows,
    empty,
    SLOTS: tl.constexpr,
):
    slot = tl.arange(0, SLOTS)
    live = slot < requests
    inside = slot < count
    width = tl.load(widths + slot, mask=live, other=0).to(tl.int32)
    left = rows - tl.sum(width, axis=0)
    spare = tl.maximum(count - requests, 1)
    padding = left // spare + (slot - requests < left % spare).to(tl.int32)
    width = tl.where(live, width, tl.where(inside, padding, 0))
    length = tl.load(seq_lens + slot, mask=live, other=empty).to(tl.int64)
    tl.store(slot_widths + slot, width, mask=inside)
    tl.store(slot_indptr, 0)
    tl.store(slot_indptr + 1 + slot, tl.cumsum(width, axis=0), mask=inside)
    tl.store(slot_lens + slot, length, mask=inside)
    tl.store(slot_ends + slot, length + width, mask=inside)
    tl.store(slot_requests + slot, tl.load(request_slots + slot, mask=live, other=0).to(tl.int64), mask=inside)


def fill_slots(
    widths: Tensor, seq_lens: Tensor, request_slots: Tensor, slots: GraphSlots, *, rows: int, empty: int
) -> None:
    """Write a batch into the slots that a verification's graph reads; see `whiflash_kernels.block.fill_slots`."""
    count = len(slots.widths)
    _slots_kernel[(1,)](
        widths.contiguous(),
        seq_lens.contiguous(),
        request_slots.contiguous(),
        *slots,
        len(widths),
        count,
        rows,
        empty,
        SLOTS=lanes(count),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["stride", "stop_columns"])
def _accept_kernel(
    predictions,
    input_ids,
    qo_indptr,
    seq_lens,
    accept_lens,
    tokens,
    bonus,
    new_seq_lens,
    last_rows,
    request_slots,
    stops,
    text,
    stride,
    stop_columns,
    text_row,
    COLUMNS: tl.constexpr,
):
    request = tl.program_id(0)
    start = tl.load(qo_indptr + request).to(tl.int64)
    width = tl.minimum((tl.load(qo_indptr + request + 1) - start).to(tl.int32), stride)
    column = tl.arange(0, COLUMNS)
    predicted = tl.load(predictions + start + column, mask=column < width, other=0)
    drafted = tl.load(input_ids + start + column + 1, mask=column < width - 1, other=0)
    goes_on = (predicted == drafted) & (column < width - 1)
    slot = tl.load(request_slots + request).to(tl.int64)
    for i in range(stop_columns):
        goes_on = goes_on & (predicted != tl.load(stops + slot * stop_columns + i))
    accepted = tl.min(tl.where(goes_on, COLUMNS, column), axis=0)
    length = tl.where(width > 0, accepted + 1, 0)
    kept = tl.where(column < length, predicted, 0)
    inside = column < stride
    before = tl.load(seq_lens + request)
    tl.store(accept_lens + request, length)
    tl.store(tokens + request.to(tl.int64) * stride + column, kept, mask=inside)
    tl.store(bonus + request, tl.load(predictions + start + accepted, mask=width > 0, other=0))
    tl.store(new_seq_lens + request, before + length)
    tl.store(last_rows + request, start + tl.maximum(length - 1, 0))
    tl.store(text + slot * text_row + before.to(tl.int64) + 1 + column, kept, mask=inside)


def accept_and_commit(
    predictions: Tensor,
    input_ids: Tensor,
    qo_indptr: Tensor,
    seq_lens: Tensor,
    *,
    stride: int,
    request_slots: Tensor,
    stops: Tensor,
    text: Tensor,
) -> Committed:
    """Accept each request's correct drafts, and extend its text; see `whiflash_kernels.block.accept_and_commit`."""
    requests, device = qo_indptr.shape[0] - 1, predictions.device
    committed = Committed(
        accept_lens=torch.empty(requests, dtype=torch.int32, device=device),
        tokens=torch.empty(requests, stride, dtype=torch.int64, device=device),
        bonus=torch.empty(requests, dtype=torch.int64, device=device),
        seq_lens=torch.empty(requests, dtype=seq_lens.dtype, device=device),
        last_rows=torch.empty(requests, dtype=torch.int64, device=device),
    )
    if requests:
        _accept_kernel[(requests,)](
            predictions.contiguous(),
            input_ids.contiguous(),
            qo_indptr.contiguous(),
            seq_lens.contiguous(),
            *committed,
            request_slots.contiguous(),
            stops,
            text,
            stride,
            stops.shape[1],
            text.stride(0),
            COLUMNS=draft_columns(stride),
            num_warps=1,
        )
    return committed

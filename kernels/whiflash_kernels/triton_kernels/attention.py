# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Draft attention over paged KV: a request's few rows at once, its entries split over the chip.

The query heads of a KV head are rows of one tile, so K and V are read once for all of them. A split without entries
leaves a weight of zero behind, so the number of splits need not know the lengths.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.triton_kernels.launch import is_hopper, multiprocessors, power_of_two

ENTRIES = 64
"""Entries of one step of the loop."""
MOST_ROWS = 128
"""Rows of one tile: ``width`` times the query heads of a KV head, cut where there are more."""
WIDE = 256
"""Dimensions of a head above which tiles of 16 rows and entries take the place of these: more would not fit."""
MOST_SPLITS = 32
ENTRIES_PER_SPLIT = 256
PROGRAMS_PER_MULTIPROCESSOR = 2

_LOG2E = tl.constexpr(1.4426950408889634)
_MASKED = tl.constexpr(-1e30)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """float32 product of two tiles; Triton's interpreter multiplies bfloat16 as if it were integers."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit(do_not_specialize=["extra", "window"])
def _attend_kernel(
    q,
    k,
    v,
    table,
    request_slots,
    seq_lens,
    out,
    partial,
    peaks,
    extra,
    window,
    scale,
    q_row,
    q_head,
    k_slot,
    k_head,
    v_slot,
    v_head,
    table_row,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    request, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    split = tl.program_id(2)
    end = tl.load(seq_lens + request).to(tl.int32) + extra
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    position = end - WIDTH + row // GROUPS
    head = kv_head * GROUPS + row % GROUPS
    live = row < WIDTH * GROUPS
    packed = (request * WIDTH + row // GROUPS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = live[:, None] & (column < DIM)[None, :]
    query = tl.load(
        q + packed[:, None] * q_row + head[:, None] * q_head + column[None, :], mask=inside, other=0.0
    )

    lower = 0
    if WINDOWED:
        lower = tl.maximum(end - WIDTH + tl.program_id(1) * ROWS // GROUPS - window, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - lower, 0), SPLITS), STEP) * STEP
    begin = lower + split * share
    stop = tl.minimum(begin + share, end)
    slots = table + tl.load(request_slots + request).to(tl.int64) * table_row

    peak = tl.full([ROWS], _MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, stop, STEP):
        entry = start + tl.arange(0, STEP)
        there = entry < stop
        slot = tl.load(slots + entry, mask=there, other=0).to(tl.int64)
        wanted = there[:, None] & (column < DIM)[None, :]
        keys = tl.load(
            k + slot[:, None] * k_slot + kv_head * k_head + column[None, :], mask=wanted, other=0.0
        )
        scores = _product(query, tl.trans(keys), PRECISION, WIDEN) * (scale * _LOG2E)
        seen = there[None, :] & live[:, None]
        if CAUSAL:
            seen &= entry[None, :] <= position[:, None]
        if WINDOWED:
            seen &= entry[None, :] >= position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        total = total * fade + tl.sum(weights, axis=1)
        values = tl.load(
            v + slot[:, None] * v_slot + kv_head * v_head + column[None, :], mask=wanted, other=0.0
        )
        added = _product(weights.to(values.dtype), values, PRECISION, WIDEN)
        sums = sums * fade[:, None] + added
        peak = new_peak

    heads = KV_HEADS * GROUPS
    result = packed * heads + head
    if SPLITS == 1:
        mean = sums / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + result[:, None] * DIM + column[None, :], mean.to(out.dtype.element_ty), mask=inside)
    else:
        place = result * SPLITS + split
        tl.store(partial + place[:, None] * DIM + column[None, :], sums, mask=inside)
        tl.store(peaks + place * 2, peak, mask=live)
        tl.store(peaks + place * 2 + 1, total, mask=live)


@triton.jit
def _merge_splits_kernel(
    partial, peaks, out, DIM: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr
):
    result = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, PADDED), tl.arange(0, COLUMNS)
    place = result * SPLITS + split
    used = split < SPLITS
    peak = tl.load(peaks + place * 2, mask=used, other=_MASKED)
    total = tl.load(peaks + place * 2 + 1, mask=used, other=0.0)
    weight = tl.exp2(peak - tl.max(peak, axis=0))
    inside = used[:, None] & (column < DIM)[None, :]
    sums = tl.load(partial + place[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    whole = tl.sum(total * weight, axis=0)
    mean = tl.sum(sums * weight[:, None], axis=0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out + result * DIM + column, mean.to(out.dtype.element_ty), mask=column < DIM)


def draft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    req_to_token: Tensor,
    request_slots: Tensor,
    seq_lens: Tensor,
    extra: int,
    width: int,
    causal: bool,
    scale: float,
    window: int | None,
    longest: int,
    *,
    splits: int | None = None,
) -> Tensor:
    """See `whiflash_kernels.attention.draft_attention`; ``splits``: of a request's entries, None: by size."""
    requests, heads, dim = request_slots.shape[0], q.shape[1], q.shape[2]
    kv_heads, groups = k.shape[1], heads // k.shape[1]
    out = torch.empty(requests * width, heads, dim, dtype=q.dtype, device=q.device)
    if requests == 0:
        return out
    wide = dim > WIDE
    # Tensor cores take tiles of 16 rows or more.
    columns = max(16, power_of_two(dim))
    most_rows = MOST_ROWS if columns <= 128 else MOST_ROWS // 2  # of wider heads more would not fit
    rows = 16 if wide else max(16, power_of_two(min(width * groups, most_rows)))
    tiles = triton.cdiv(width * groups, rows)
    if splits is None:
        splits = splits_for(requests * kv_heads * tiles, longest, q.device)
    partial = peaks = None
    if splits > 1:
        partial = torch.empty(requests * width * heads, splits, dim, dtype=torch.float32, device=q.device)
        peaks = torch.empty(requests * width * heads, splits, 2, dtype=torch.float32, device=q.device)
    # Hopper multiplies 64 rows by four warps; of eight, four would do the same again.
    warps = 4 if rows * columns < 64 * 128 or (rows == 64 and is_hopper(q)) else 8
    _attend_kernel[(requests * kv_heads, tiles, splits)](
        q,
        k,
        v,
        req_to_token,
        request_slots.contiguous(),
        seq_lens.contiguous(),
        out,
        partial,
        peaks,
        extra,
        window or 0,
        scale,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        req_to_token.stride(0),
        WIDTH=width,
        GROUPS=groups,
        KV_HEADS=kv_heads,
        DIM=dim,
        CAUSAL=causal,
        WINDOWED=window is not None,
        SPLITS=splits,
        ROWS=rows,
        COLUMNS=columns,
        STEP=16 if wide else ENTRIES,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        WIDEN=q.dtype == torch.bfloat16 and not q.is_cuda and not q.is_meta,
        num_warps=warps,
        num_stages=1 if wide else 2,
    )
    if splits > 1:
        _merge_splits_kernel[(requests * width * heads,)](
            partial,
            peaks,
            out,
            DIM=dim,
            SPLITS=splits,
            PADDED=power_of_two(splits),
            COLUMNS=columns,
            num_warps=4 if splits * columns > 1024 else 1,
        )
    return out


def splits_for(programs: int, longest: int, device: torch.device) -> int:
    """Splits that fill the chip, a power of two: few enough to be worth a program each where a request is longest."""
    wanted = triton.cdiv(multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR, programs)
    most: int = min(wanted, MOST_SPLITS, triton.cdiv(longest, ENTRIES_PER_SPLIT))
    return 1 << max(most, 1).bit_length() - 1

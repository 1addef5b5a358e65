# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Draft attention over paged KV: a request's few rows at once, long requests' entries split over the chip.

The query heads of a KV head are rows of one tile, so K and V are read once for all of them. The device alone knows the
lengths: every program of the first launch counts how many shares each request's entries are cut into, and takes one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.triton_kernels.launch import is_hopper, lanes, multiprocessors, power_of_two
from whiflash_kernels.triton_kernels.shares import LEAST, LOG2E, merge, product, share_of, shares_of, sums_for

ENTRIES = 64
"""KV entries that one step of the loop reads."""
MOST_ROWS = 128
"""Most rows of one tile. A tile's rows are ``width`` times the query heads of a KV head; more rows take more tiles."""
WIDE = 256
"""Head size above which tiles have 16 rows and 16 entries, because larger tiles would not fit."""
FEWEST_ENTRIES = 64
"""Least entries of a share. With one request a round waits for a program's steps, and merging sums costs few bytes."""
PROGRAMS_PER_MULTIPROCESSOR = 2


@triton.jit(do_not_specialize=["extra", "window", "requests", "shares", "fewest"])
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
    merges,
    extra,
    window,
    requests,
    shares,
    fewest,
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
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # Tiles come first in the grid, then heads, so that neighbouring programs read the same or adjacent entries.
    tile, kv_head = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    item = tl.program_id(1)
    request, share, count, place = item, 0, 1, tl.full([], 0, tl.int32)
    if LANES > 0:
        lane = tl.arange(0, LANES)
        entries = tl.load(seq_lens + lane, mask=lane < requests, other=0).to(tl.int32) + extra
        if WINDOWED:
            entries = tl.minimum(entries, WIDTH + window)
        entries = tl.where(lane < requests, tl.maximum(entries, 0), 0)
        counts = tl.where(lane < requests, shares_of(entries, shares, fewest, STEP), 0)
        if item >= tl.sum(counts, axis=0):
            return
        lists = (item == 0) & (tl.program_id(0) == 0)
        request, share, count, place = share_of(item, lane, counts, merges, lists)
    end = tl.load(seq_lens + request).to(tl.int32) + extra
    row = tile * ROWS + tl.arange(0, ROWS)
    position = end - WIDTH + row // GROUPS
    head = kv_head * GROUPS + row % GROUPS
    live = row < WIDTH * GROUPS
    packed = (request * WIDTH + row // GROUPS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = live[:, None] & (column < DIM)[None, :]
    query = tl.load(q + packed[:, None] * q_row + head[:, None] * q_head + column[None, :], mask=inside, other=0.0)

    lower = 0
    if WINDOWED:
        lower = tl.maximum(end - WIDTH + tile * ROWS // GROUPS - window, 0)
    size = tl.cdiv(tl.cdiv(tl.maximum(end - lower, 0), count), STEP) * STEP
    begin = lower + share * size
    stop = tl.minimum(begin + size, end)
    slots = table + tl.load(request_slots + request).to(tl.int64) * table_row

    peak = tl.full([ROWS], LEAST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, stop, STEP):
        entry = start + tl.arange(0, STEP)
        there = entry < stop
        slot = tl.load(slots + entry, mask=there, other=0).to(tl.int64)
        wanted = there[:, None] & (column < DIM)[None, :]
        keys = tl.load(k + slot[:, None] * k_slot + kv_head * k_head + column[None, :], mask=wanted, other=0.0).to(
            query.dtype
        )
        scores = product(query, tl.trans(keys), PRECISION, WIDEN) * (scale * LOG2E)
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
        values = tl.load(v + slot[:, None] * v_slot + kv_head * v_head + column[None, :], mask=wanted, other=0.0).to(
            query.dtype
        )
        added = product(weights.to(values.dtype), values, PRECISION, WIDEN)
        sums = sums * fade[:, None] + added
        peak = new_peak

    # One tile of sums serves both stores, which are masked: two tiles, or a branch, would spill registers.
    sums = sums / tl.where((count == 1) & (total > 0), total, 1.0)[:, None]
    result = packed * (KV_HEADS * GROUPS) + head
    whole = inside & (count == 1)
    tl.store(out + result[:, None] * DIM + column[None, :], sums.to(out.dtype.element_ty), mask=whole)
    if LANES > 0:
        kept = (place.to(tl.int64) * KV_HEADS + kv_head) * (WIDTH * GROUPS) + row
        tl.store(partial + kept[:, None] * DIM + column[None, :], sums, mask=inside & (count > 1))
        tl.store(peaks + kept * 2, peak, mask=live & (count > 1))
        tl.store(peaks + kept * 2 + 1, total, mask=live & (count > 1))


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
) -> Tensor:
    """Compute draft rows' attention over their requests' paged KV; see `whiflash_kernels.attention.draft_attention`."""
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
    shares = shares_for(requests, kv_heads * tiles, longest, q.device)
    cut = min(requests, shares - 1)
    sums = sums_for(requests, shares, width * heads, dim, q.device) if cut else None
    # Hopper multiplies 64 rows with four warps; with eight, four would repeat the work of the others.
    warps = 4 if rows * columns < 64 * 128 or (rows == 64 and is_hopper(q)) else 8
    _attend_kernel[(tiles * kv_heads, requests + shares - 1)](
        q,
        k,
        v,
        req_to_token,
        request_slots.contiguous(),
        seq_lens.contiguous(),
        out,
        *(sums or (None, None, None)),
        extra,
        window or 0,
        requests,
        shares,
        FEWEST_ENTRIES,
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
        LANES=lanes(requests) if cut else 0,
        TILES=tiles,
        ROWS=rows,
        COLUMNS=columns,
        # Scores of 128 rows by 64 entries would not fit into registers.
        STEP=16 if wide else ENTRIES // 2 if rows > 64 else ENTRIES,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        WIDEN=q.dtype == torch.bfloat16 and not q.is_cuda and not q.is_meta,
        num_warps=warps,
        num_stages=1 if wide else 2,
    )
    if sums is not None:
        merge(sums, out, width, kv_heads, columns)
    return out


def shares_for(requests: int, programs: int, longest: int, device: torch.device) -> int:
    """Return into about how many shares all entries are cut: enough to fill the chip with ``programs`` for each share.

    It depends on sizes that the host knows, not on lengths, so a captured launch keeps it.
    """
    fill = triton.cdiv(multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR, programs)
    return min(fill, requests * (triton.cdiv(longest, FEWEST_ENTRIES) - 1) + 1)

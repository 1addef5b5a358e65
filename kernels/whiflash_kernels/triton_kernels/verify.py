# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Verification attention of ragged rows over paged KV, long prefixes split over the chip (`shares`).

The last share of a request also has its new rows, from the forward's own K and V, and the sink.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.triton_kernels.launch import lanes, power_of_two
from whiflash_kernels.triton_kernels.shares import (
    LEAST,
    LOG2E,
    filling,
    merge,
    places,
    product,
    share_of,
    shares_of,
    sums_for,
)

KEYS = 64
"""Keys of one step of the loop."""
MOST_ROWS = 64
"""Rows of one tile; a request with more (rows times query heads of a KV head) has several, which share keys in L2."""
FEWEST_KEYS = 256
"""Keys of a share at least."""
PROGRAMS_PER_MULTIPROCESSOR = 4
"""Programs that all keys are cut for, beside one a request: two waves of two resident ones."""
STAGES = 2
"""Steps of the loop over a prefix that are under way: three are untried on a card."""


@triton.jit
def _step(
    query, keys, values, seen, peak, total, sums, factor, cap,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in powers of two."""
    scores = product(query, tl.trans(keys), PRECISION, WIDEN) * factor
    if CAPPED:
        scores = cap * (1 - 2 / (tl.exp2(scores / cap * (2 * LOG2E)) + 1))
    scores = tl.where(seen, scores * LOG2E, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    weights, fade = tl.exp2(scores - new_peak[:, None]), tl.exp2(peak - new_peak)
    added = product(weights.to(values.dtype), values, PRECISION, WIDEN)
    return new_peak, total * fade + tl.sum(weights, axis=1), sums * fade[:, None] + added


@triton.jit
def _add_prefix(
    query, peak, total, sums, k_pool, v_pool, slots, begin, stop, prefix, turn, live, window, k_slot, v_slot, column,
    wide, factor, cap,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add the keys from ``begin`` to ``stop`` of a prefix, whose slots begin at ``slots``."""
    for start in range(begin, stop, STEP):
        entry = start + tl.arange(0, STEP)
        there = entry < stop
        slot = tl.load(slots + entry, mask=there, other=0).to(tl.int64)
        wanted = there[:, None] & wide[None, :]
        keys = tl.load(k_pool + slot[:, None] * k_slot + column[None, :], mask=wanted, other=0.0).to(
            query.dtype
        )
        values = tl.load(v_pool + slot[:, None] * v_slot + column[None, :], mask=wanted, other=0.0).to(
            query.dtype
        )
        seen = there[None, :] & live[:, None]
        if WINDOWED:
            seen &= entry[None, :] >= prefix + turn[:, None] - window
        peak, total, sums = _step(
            query, keys, values, seen, peak, total, sums, factor, cap, CAPPED, PRECISION, WIDEN
        )
    return peak, total, sums


@triton.jit
def _add_rows(
    query, peak, total, sums, k, v, first_row, rows, turn, live, window, k_row, v_row, column, wide, factor, cap,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add the request's own first ``rows``, each for itself and those behind it. Few are not worth a pipeline."""
    for start in tl.range(0, rows, STEP, num_stages=1):
        entry = start + tl.arange(0, STEP)
        there = entry < rows
        wanted = there[:, None] & wide[None, :]
        new = (first_row + entry).to(tl.int64)
        keys = tl.load(k + new[:, None] * k_row + column[None, :], mask=wanted, other=0.0)
        values = tl.load(v + new[:, None] * v_row + column[None, :], mask=wanted, other=0.0)
        seen = live[:, None] & (entry[None, :] <= turn[:, None])
        if WINDOWED:
            seen &= entry[None, :] >= turn[:, None] - window
        peak, total, sums = _step(
            query, keys, values, seen, peak, total, sums, factor, cap, CAPPED, PRECISION, WIDEN
        )
    return peak, total, sums


@triton.jit
def _add_sink(peak, total, sums, sinks, head, seen):
    """Add a key without a value, which every row sees once."""
    sink = tl.load(sinks + head, mask=seen, other=float("-inf")).to(tl.float32) * LOG2E
    new_peak = tl.maximum(peak, sink)
    fade = tl.exp2(peak - new_peak)
    return new_peak, total * fade + tl.exp2(sink - new_peak), sums * fade[:, None]


@triton.jit
def _attend(
    q, k, v, k_pool, v_pool, slots, sinks, out, partial, peaks,
    first_row, rows, first, begin, stop, prefix, kv_head, kept, last, whole, most, window, scale, cap, k_scale, v_scale,
    q_row, q_head, k_row, v_row, k_slot, v_slot,
    GROUPS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Attend from a tile of a request's rows to the keys from ``begin`` to ``stop`` of its prefix.

    The tile begins with row ``first`` of rows times query heads of ``kv_head``, where k, v and the pools begin. With
    the ``last`` of the request's keys come its own rows. A ``whole`` request is written to ``out``, of others sums
    are kept at place ``kept``.
    """
    row = first + tl.arange(0, ROWS)
    turn, head = row // GROUPS, kv_head * GROUPS + row % GROUPS
    live = turn < rows
    packed = (first_row + turn).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    wide = column < DIM
    inside = live[:, None] & wide[None, :]
    query = tl.load(
        q + packed[:, None] * q_row + head[:, None] * q_head + column[None, :], mask=inside, other=0.0
    )
    peak = tl.full([ROWS], LEAST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    peak, total, sums = _add_prefix(
        query, peak, total, sums, k_pool, v_pool, slots, begin, stop, prefix, turn, live, window, k_slot, v_slot,
        column, wide, scale * k_scale, cap, WINDOWED, CAPPED, STEP, PRECISION, WIDEN,
    )  # fmt: skip
    sums *= v_scale
    peak, total, sums = _add_rows(
        query, peak, total, sums, k, v, first_row, tl.where(last, rows, 0), turn, live, window, k_row, v_row,
        column, wide, scale, cap, WINDOWED, CAPPED, STEP, PRECISION, WIDEN,
    )  # fmt: skip
    if SUNK:
        peak, total, sums = _add_sink(peak, total, sums, sinks, head, live & last)

    # One tile of sums serves both stores, which are masked: two tiles, or a branch, would spill.
    sums = sums / tl.where(whole & (total > 0), total, 1.0)[:, None]
    result = packed * (KV_HEADS * GROUPS) + head
    tl.store(
        out + result[:, None] * DIM + column[None, :], sums.to(out.dtype.element_ty), mask=inside & whole
    )
    kept = (kept.to(tl.int64) * KV_HEADS + kv_head) * (most * GROUPS) + row
    tl.store(partial + kept[:, None] * DIM + column[None, :], sums, mask=inside & ~whole)
    tl.store(peaks + kept * 2, peak, mask=live & ~whole)
    tl.store(peaks + kept * 2 + 1, total, mask=live & ~whole)


@triton.jit(do_not_specialize=["most", "tiles", "window", "requests", "shares", "fewest"])
def _verify_kernel(
    q, k, v, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices, sinks, out, partial, peaks, merges,
    most, tiles, window, requests, shares, fewest, scale, cap, k_scale, v_scale,
    q_row, q_head, k_row, k_head, v_row, v_head, k_slot, k_slot_head, v_slot, v_slot_head,
    GROUPS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SUNK: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # Tiles come first in the grid, then heads: their programs read the same keys, or such beside them.
    tile, kv_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    item, lane = tl.program_id(1), tl.arange(0, LANES)
    inside = lane < requests
    begins = tl.load(qo_indptr + lane, mask=inside, other=0)
    widths = (tl.load(qo_indptr + lane + 1, mask=inside, other=0) - begins).to(tl.int32)
    if (tile > 0) & (tile * ROWS >= tl.max(widths, axis=0) * GROUPS):
        return
    begins = tl.load(kv_indptr + lane, mask=inside, other=0)
    entries = (tl.load(kv_indptr + lane + 1, mask=inside, other=0) - begins).to(tl.int32)
    if WINDOWED:
        entries = tl.minimum(entries, window)
    entries = tl.where(widths > 0, entries, 0)
    counts = tl.where(widths > 0, shares_of(entries, shares, fewest, STEP), 0)
    lists = (item == 0) & (tl.program_id(0) == 0)
    request, share, count, place = share_of(item, lane, counts, merges, lists)
    if item >= tl.sum(counts, axis=0):
        return
    first_row = tl.load(qo_indptr + request).to(tl.int32)
    rows = tl.minimum(tl.load(qo_indptr + request + 1).to(tl.int32) - first_row, most)
    if tile * ROWS >= rows * GROUPS:
        return
    first_key = tl.load(kv_indptr + request).to(tl.int64)
    prefix = (tl.load(kv_indptr + request + 1) - first_key).to(tl.int32)
    lower = 0
    if WINDOWED:
        lower = tl.maximum(prefix + tile * ROWS // GROUPS - window, 0)
    size = tl.cdiv(tl.cdiv(tl.maximum(prefix - lower, 0), count), STEP) * STEP
    begin = lower + share * size
    _attend(
        q, k + kv_head * k_head, v + kv_head * v_head, k_pool + kv_head * k_slot_head, v_pool + kv_head * v_slot_head,
        kv_indices + first_key, sinks, out, partial, peaks,
        first_row, rows, tile * ROWS, begin, tl.minimum(begin + size, prefix), prefix, kv_head, place,
        share == count - 1, count == 1, most, window, scale, cap, k_scale, v_scale,
        q_row, q_head, k_row, v_row, k_slot, v_slot,
        GROUPS, KV_HEADS, DIM, WINDOWED, CAPPED, SUNK, ROWS, COLUMNS, STEP, PRECISION, WIDEN,
    )  # fmt: skip


def verify_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    *,
    most: int,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See `whiflash_kernels.verify.verify_attention`."""
    requests, (heads, dim), kv_heads = len(qo_indptr) - 1, q.shape[1:], k.shape[1]
    if not requests:
        return
    groups, columns = heads // kv_heads, max(16, power_of_two(dim))
    # Tensor cores take tiles of 16 rows or more; of wider heads fewer fit.
    rows = max(16, power_of_two(min(most * groups, MOST_ROWS if columns <= 128 else MOST_ROWS // 2)))
    tiles = triton.cdiv(most * groups, rows)
    shares = shares_for(kv_heads, q.device)
    sums = sums_for(requests, shares, most * heads, dim, q.device)
    _verify_kernel[(tiles * kv_heads, requests + shares - 1)](
        q,
        k,
        v,
        k_pool,
        v_pool,
        qo_indptr,
        kv_indptr,
        kv_indices,
        sinks,
        out,
        *sums,
        most,
        tiles,
        window or 0,
        requests,
        shares,
        FEWEST_KEYS,
        scale,
        cap,
        k_scale,
        v_scale,
        *(tensor.stride(axis) for tensor in (q, k, v, k_pool, v_pool) for axis in (0, 1)),
        GROUPS=groups,
        KV_HEADS=kv_heads,
        DIM=dim,
        WINDOWED=window is not None,
        CAPPED=cap > 0,
        SUNK=sinks is not None,
        LANES=lanes(requests),
        ROWS=rows,
        COLUMNS=columns,
        STEP=KEYS if columns <= 128 else KEYS // 2,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        WIDEN=q.dtype == torch.bfloat16 and not q.is_cuda and not q.is_meta,
        num_warps=4 if rows * columns < 64 * 128 and columns <= 128 else 8,
        num_stages=STAGES,
    )
    merge(sums, out, most, kv_heads, columns, qo_indptr)


def shares_for(kv_heads: int, device: torch.device) -> int:
    """Into how many shares all prefixes are cut, roughly, whatever their lengths: a captured launch keeps it."""
    return max(filling(kv_heads, device, PROGRAMS_PER_MULTIPROCESSOR), 2)


def sums_bytes(requests: int, most: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> int:
    """See `whiflash_kernels.verify.sums_bytes`."""
    shares = shares_for(kv_heads, device)
    return places(requests, shares) * most * heads * (dim + 2) * 4

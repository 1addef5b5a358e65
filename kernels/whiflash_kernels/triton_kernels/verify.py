# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Verification attention of ragged rows over paged KV: all requests' keys are dealt to programs that run at once.

One launch a forward plans it: keys are counted in steps of the loop, requests after each other, and each program takes
as many steps, whichever requests they are of. So one wave of programs reads long requests and many short ones alike,
and only requests that two programs share leave sums to merge. The last step of a request is its new rows, from the
forward's own K and V, with the sink.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.tile import NARROW as NARROW_ROWS
from whiflash_kernels.triton_kernels.launch import is_hopper, lanes, multiprocessors, power_of_two
from whiflash_kernels.triton_kernels.shares import LEAST, LOG2E, merge, places, product, sums_for

KEYS = 64
"""Keys that one step of the loop reads."""
MOST_ROWS = 64
"""Most rows of one tile (rows times query heads of a KV head); further tiles of a request find its keys in L2."""
NARROW = tl.constexpr(NARROW_ROWS)
"""Rows of the smaller tile, for requests that verify few rows and for the rest after whole tiles (17 rows of four heads
are 64 and 4)."""
FEWEST_KEYS = 256
"""Least keys of a share: a request with fewer is never cut."""
PROGRAMS_PER_MULTIPROCESSOR = 2
"""Programs per multiprocessor among which all keys are divided: one wave if two fit at once, else two waves."""
STAGES = 2
"""Pipeline stages of the loop over a prefix; three have not been tried on a GPU."""


@triton.jit
def _step(
    query, keys, values, seen, peak, total, sums, factor, cap,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add a step of keys to the online softmax, in powers of two; return the new peak, total and sums."""
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
        keys = tl.load(k_pool + slot[:, None] * k_slot + column[None, :], mask=wanted, other=0.0).to(query.dtype)
        values = tl.load(v_pool + slot[:, None] * v_slot + column[None, :], mask=wanted, other=0.0).to(query.dtype)
        seen = there[None, :] & live[:, None]
        if WINDOWED:
            seen &= entry[None, :] >= prefix + turn[:, None] - window
        peak, total, sums = _step(query, keys, values, seen, peak, total, sums, factor, cap, CAPPED, PRECISION, WIDEN)
    return peak, total, sums


@triton.jit
def _add_rows(
    query, peak, total, sums, k, v, first_row, rows, turn, live, window, k_row, v_row, column, wide, factor, cap,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add the request's own first ``rows`` as keys, each seen by itself and later rows. Few rows need no pipeline."""
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
        peak, total, sums = _step(query, keys, values, seen, peak, total, sums, factor, cap, CAPPED, PRECISION, WIDEN)
    return peak, total, sums


@triton.jit
def _attend(
    q, k, v, k_pool, v_pool, slots, sinks, out, partial, peaks,
    first_row, rows, first, begin, stop, prefix, kv_head, kept, last, whole, most, window, scale, cap, k_scale, v_scale,
    q_row, q_head, k_row, k_head, v_row, v_head, k_slot, v_slot,
    GROUPS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute a tile of a request's rows over the keys from ``begin`` to ``stop`` of its prefix.

    The tile begins with row ``first`` of (rows times query heads of ``kv_head``). The pools' pointers are at that head.
    ``last``: the request's own rows are added, too. ``whole``: the result is written to ``out``; otherwise partial sums
    are written at place ``kept``.
    """
    row = first + tl.arange(0, ROWS)
    turn, head = row // GROUPS, kv_head * GROUPS + row % GROUPS
    live = turn < rows
    packed = (first_row + turn).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    wide = column < DIM
    inside = live[:, None] & wide[None, :]
    query = tl.load(q + packed[:, None] * q_row + head[:, None] * q_head + column[None, :], mask=inside, other=0.0)
    peak = tl.full([ROWS], LEAST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    peak, total, sums = _add_prefix(
        query, peak, total, sums, k_pool, v_pool, slots, begin, stop, prefix, turn, live, window, k_slot, v_slot,
        column, wide, scale * k_scale, cap, WINDOWED, CAPPED, STEP, PRECISION, WIDEN,
    )  # fmt: skip
    sums *= v_scale
    peak, total, sums = _add_rows(
        query, peak, total, sums, k + kv_head * k_head, v + kv_head * v_head, first_row, tl.where(last, rows, 0), turn,
        live, window, k_row, v_row, column, wide, scale, cap, WINDOWED, CAPPED, STEP, PRECISION, WIDEN,
    )  # fmt: skip
    if SUNK:  # a key without a value, which every row sees once
        sink = tl.load(sinks + head, mask=live & last, other=float("-inf")).to(tl.float32) * LOG2E
        new_peak = tl.maximum(peak, sink)
        fade = tl.exp2(peak - new_peak)
        total, sums, peak = total * fade + tl.exp2(sink - new_peak), sums * fade[:, None], new_peak

    # One tile of sums serves both stores, which are masked: two tiles, or a branch, would spill registers.
    sums = sums / tl.where(whole & (total > 0), total, 1.0)[:, None]
    result = packed * (KV_HEADS * GROUPS) + head
    tl.store(out + result[:, None] * DIM + column[None, :], sums.to(out.dtype.element_ty), mask=inside & whole)
    kept = (kept.to(tl.int64) * KV_HEADS + kv_head) * (most * GROUPS) + row
    tl.store(partial + kept[:, None] * DIM + column[None, :], sums, mask=inside & ~whole)
    tl.store(peaks + kept * 2, peak, mask=live & ~whole)
    tl.store(peaks + kept * 2 + 1, total, mask=live & ~whole)


@triton.jit(do_not_specialize=["most", "window", "requests", "shares", "fewest"])
def _plan_kernel(
    qo_indptr, kv_indptr, programs, spans, merges, most, window, requests, shares, fewest,
    GROUPS: tl.constexpr, WINDOWED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Divide the steps of all requests among ``shares`` programs per KV head, counted over all tiles.

    Each program writes its line of ``programs`` [shares, 4]: its range of requests and its range of steps, ends
    excluded, in the sequence of all requests' steps. The first program writes ``spans`` [requests, 3]: steps at which a
    request begins and ends, and the number of cut requests before it, -1 if it is not cut; and ``merges`` (`Sums`).
    """
    program, lane = tl.program_id(0), tl.arange(0, LANES)
    there = lane < requests
    begins = tl.load(qo_indptr + lane, mask=there, other=0)
    rows = (tl.load(qo_indptr + lane + 1, mask=there, other=0) - begins).to(tl.int32)
    begins = tl.load(kv_indptr + lane, mask=there, other=0)
    keys = (tl.load(kv_indptr + lane + 1, mask=there, other=0) - begins).to(tl.int32)
    if WINDOWED:
        keys = tl.minimum(keys, window)
    steps = tl.where(rows > 0, tl.cdiv(keys, STEP) + 1, 0)
    ends, whole = tl.cumsum(steps, axis=0), tl.sum(steps, axis=0)
    starts = ends - steps
    # Several tiles of a request read the same keys, each in programs of its own.
    work = tl.sum(steps * tl.cdiv(tl.minimum(rows, most) * GROUPS, ROWS), axis=0)
    used = (shares * whole.to(tl.int64) // tl.maximum(work, 1)).to(tl.int32)
    each = tl.maximum(tl.cdiv(whole, tl.maximum(used, 1)), fewest)

    opens = program * each
    closes = tl.minimum(opens + each, whole)
    # A short request is not cut: the program in which it begins reads all of it.
    short = steps <= fewest
    read = tl.where(short, starts + tl.minimum(steps, 1), ends) <= opens
    tl.store(programs + 4 * program, tl.sum((there & read).to(tl.int32), axis=0))
    tl.store(programs + 4 * program + 1, tl.sum((there & (starts < closes)).to(tl.int32), axis=0))
    tl.store(programs + 4 * program + 2, opens)
    tl.store(programs + 4 * program + 3, closes)
    if program == 0:
        first, last = starts // each, (ends - 1) // each
        cut = (last > first) & ~short
        rank = tl.cumsum(cut.to(tl.int32), axis=0) - cut.to(tl.int32)
        tl.store(spans + 3 * lane, starts, mask=there)
        tl.store(spans + 3 * lane + 1, ends, mask=there)
        tl.store(spans + 3 * lane + 2, tl.where(cut, rank, -1), mask=there)
        tl.store(merges, tl.sum(cut.to(tl.int32), axis=0))
        tl.store(merges + 1 + 3 * rank, lane, mask=cut)
        tl.store(merges + 2 + 3 * rank, first + rank, mask=cut)
        tl.store(merges + 3 + 3 * rank, last - first + 1, mask=cut)


@triton.jit(do_not_specialize=["most", "tiles", "window"])
def _verify_kernel(
    q, k, v, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices, sinks, out, partial, peaks, programs, spans,
    most, tiles, window, scale, cap, k_scale, v_scale,
    q_row, q_head, k_row, k_head, v_row, v_head, k_slot, k_slot_head, v_slot, v_slot_head,
    GROUPS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    # Tiles come first in the grid, then heads, so that neighbouring programs read the same or adjacent keys.
    tile, kv_head, program = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    first, behind = tl.load(programs + 4 * program), tl.load(programs + 4 * program + 1)
    for request in tl.range(first, behind, disable_licm=True):  # values that all requests share would spill
        opens, closes = tl.load(programs + 4 * program + 2), tl.load(programs + 4 * program + 3)
        start, end = tl.load(spans + 3 * request), tl.load(spans + 3 * request + 1)
        cuts = tl.load(spans + 3 * request + 2)
        first_row = tl.load(qo_indptr + request).to(tl.int32)
        rows = tl.minimum(tl.load(qo_indptr + request + 1).to(tl.int32) - first_row, most)
        first_key = tl.load(kv_indptr + request).to(tl.int64)
        prefix = (tl.load(kv_indptr + request + 1) - first_key).to(tl.int32)
        lower = 0
        if WINDOWED:
            lower = tl.maximum(prefix + tile * ROWS // GROUPS - window, 0)
        # Another program's steps come before and behind those of a request that is cut.
        begin = lower + tl.where(cuts < 0, 0, tl.maximum(opens - start, 0)) * STEP
        stop = lower + tl.where(cuts < 0, end - start, tl.minimum(closes, end) - start) * STEP
        left = rows * GROUPS - tile * ROWS
        for wide in tl.static_range(2 if ROWS > NARROW else 1):
            if (left > wide * NARROW) & ((left <= NARROW) | (wide == 1)):
                _attend(
                    q, k, v, k_pool + kv_head * k_slot_head, v_pool + kv_head * v_slot_head, kv_indices + first_key,
                    sinks, out, partial, peaks,
                    first_row, rows, tile * ROWS, begin, tl.minimum(stop, prefix), prefix, kv_head, program + cuts,
                    (cuts < 0) | (closes >= end), cuts < 0, most, window, scale, cap, k_scale, v_scale,
                    q_row, q_head, k_row, k_head, v_row, v_head, k_slot, v_slot,
                    GROUPS, KV_HEADS, DIM, WINDOWED, CAPPED, SUNK, ROWS if wide else NARROW, COLUMNS, STEP, PRECISION,
                    WIDEN,
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
    plans: dict[Any, Any] | None = None,
) -> None:
    """Compute verified rows' attention over prefixes and these rows; see `whiflash_kernels.verify.verify_attention`."""
    requests, (heads, dim), kv_heads = len(qo_indptr) - 1, q.shape[1:], k.shape[1]
    if not requests:
        return
    groups, columns = heads // kv_heads, max(16, power_of_two(dim))
    # Tensor cores take tiles of 16 rows or more; of wider heads fewer fit.
    rows = max(16, power_of_two(min(most * groups, MOST_ROWS if columns <= 128 else MOST_ROWS // 2)))
    tiles = triton.cdiv(most * groups, rows)
    step = KEYS if columns <= 128 else KEYS // 2
    plans = {} if plans is None else plans
    key = kv_indptr.data_ptr(), window, most, groups, kv_heads, rows, step
    if key not in plans:
        plans[key] = _planned(qo_indptr, kv_indptr, *key[1:])
    programs, spans, merges = plans[key]
    sums = sums_for(requests, len(programs), most * heads, dim, q.device)._replace(merges=merges)
    _verify_kernel[(tiles * kv_heads, len(programs))](
        *(q, k, v, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices, sinks, out, sums.partial, sums.peaks),
        *(programs, spans, most, tiles, window or 0, scale, cap, k_scale, v_scale),
        *(tensor.stride(axis) for tensor in (q, k, v, k_pool, v_pool) for axis in (0, 1)),
        GROUPS=groups,
        KV_HEADS=kv_heads,
        DIM=dim,
        WINDOWED=window is not None,
        CAPPED=cap > 0,
        SUNK=sinks is not None,
        ROWS=rows,
        COLUMNS=columns,
        STEP=step,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        WIDEN=q.dtype == torch.bfloat16 and not q.is_cuda and not q.is_meta,
        # Hopper multiplies 64 rows with four warps; with eight, four would repeat the work of the others.
        num_warps=4 if columns <= 128 and (rows * columns < 64 * 128 or is_hopper(q)) else 8,
        num_stages=STAGES,
        maxnreg=255,  # else some architectures spill registers to fit a third program per multiprocessor
    )
    merge(sums, out, most, kv_heads, columns, qo_indptr)


def _planned(
    qo: Tensor, kv: Tensor, window: int | None, most: int, groups: int, kv_heads: int, rows: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan how the steps of a batch are divided: return programs, spans and merges as `_plan_kernel` writes them."""
    requests, shares, fewest = (len(qo) - 1, shares_for(kv_heads, qo.device), triton.cdiv(FEWEST_KEYS, step) + 1)
    sizes = (shares, 4), (requests, 3), (1 + 3 * min(requests, shares - 1),)
    programs, spans, merges = (torch.empty(size, dtype=torch.int32, device=qo.device) for size in sizes)
    _plan_kernel[(shares,)](
        *(qo, kv, programs, spans, merges, most, window or 0, requests, shares, fewest),
        GROUPS=groups,
        WINDOWED=window is not None,
        LANES=lanes(requests),
        ROWS=rows,
        STEP=step,
    )
    return programs, spans, merges


def shares_for(kv_heads: int, device: torch.device) -> int:
    """Return the number of programs among which a KV head's keys are divided. It does not depend on lengths, so a
    captured launch keeps it."""
    return max(multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR // kv_heads, 2)


def sums_bytes(requests: int, most: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> int:
    """Return the bytes of `verify_attention`'s partial sums; see `whiflash_kernels.verify.sums_bytes`."""
    shares = shares_for(kv_heads, device)
    return places(requests, shares) * most * heads * (dim + 2) * 4

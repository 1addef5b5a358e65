# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Cuts long requests' KV into shares for draft attention, and merges the sums of shares for all attention.

Only the device knows lengths, so a grid depends on sizes only. Every program counts how many shares each request's
entries are cut into, and takes one. Only cut requests leave partial sums, which a second launch merges.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MERGED = 4096
"""Numbers of partial sums that a program merges at once."""
MERGERS = 8
"""Most programs that merge the same row of a head: each takes every eighth cut request."""

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1e30)
"""Initial maximum of the online softmax, below all scores."""


@triton.jit
def product(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Multiply two tiles into float32. WIDEN is for Triton's interpreter, which multiplies bfloat16 as integers."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def shares_of(entries, shares, fewest, STEP: tl.constexpr):
    """Return how many shares each request's ``entries`` are cut into: one each, and up to ``shares - 1`` more in all.

    For up to ``shares / 2`` requests all shares together are at most ``shares``: a few programs after the first wave
    would take as long as that wave. For more requests a share is at most as long as all entries over ``shares / 2``, or
    ``fewest``, rounded up to whole steps. No share is empty.
    """
    cut_for = tl.maximum(shares - tl.sum((entries > 0).to(tl.int32), axis=0), tl.cdiv(shares, 2))
    most = tl.maximum(tl.cdiv(tl.sum(entries.to(tl.int64), axis=0), cut_for).to(tl.int32), fewest)
    count = tl.maximum(tl.cdiv(entries, tl.cdiv(most, STEP) * STEP), 1)
    evenly = tl.maximum(tl.cdiv(tl.cdiv(entries, count), STEP) * STEP, STEP)
    return tl.maximum(tl.cdiv(entries, evenly), 1)


@triton.jit
def share_of(item, lane, counts, merges, lists):
    """Return for share ``item`` of the batch: its request, its number among the request's shares, their count, and the
    place of its sums. counts: shares of each request. A program that ``lists`` writes the cut requests to ``merges``
    (`Sums`).
    """
    ends, cut = tl.cumsum(counts, axis=0), counts > 1
    firsts = tl.cumsum(tl.where(cut, counts, 0), axis=0) - counts
    request = tl.sum((ends <= item).to(tl.int32), axis=0)
    count = tl.sum(tl.where(lane == request, counts, 0), axis=0)
    share = item - tl.sum(tl.where(lane == request, ends - counts, 0), axis=0)
    place = tl.sum(tl.where(lane == request, firsts, 0), axis=0) + share
    if lists:
        rank = tl.cumsum(cut.to(tl.int32), axis=0) - 1
        tl.store(merges, tl.sum(cut.to(tl.int32), axis=0))
        tl.store(merges + 1 + 3 * rank, lane, mask=cut)
        tl.store(merges + 2 + 3 * rank, firsts, mask=cut)
        tl.store(merges + 3 + 3 * rank, counts, mask=cut)
    return request, share, count, place


@triton.jit(do_not_specialize=["width"])
def _merge_shares_kernel(
    partial,
    peaks,
    merges,
    qo_indptr,
    out,
    width,
    GROUPS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SHARES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, column = tl.program_id(0), tl.arange(0, COLUMNS)
    row, kv_head = program % (width * GROUPS), program // (width * GROUPS)
    for which in range(tl.program_id(1), tl.load(merges), tl.num_programs(1)):
        request, place = tl.load(merges + 1 + 3 * which), tl.load(merges + 2 + 3 * which)
        count = tl.load(merges + 3 + 3 * which)
        first, rows = request * width, width
        if qo_indptr is not None:
            first = tl.load(qo_indptr + request).to(tl.int32)
            rows = tl.load(qo_indptr + request + 1).to(tl.int32) - first
        live = row // GROUPS < rows
        peak, whole = tl.full([], LEAST, tl.float32), tl.full([], 0.0, tl.float32)
        sums = tl.zeros([COLUMNS], tl.float32)
        for begin in range(0, tl.where(live, count, 0), SHARES):
            share = begin + tl.arange(0, SHARES)
            there = share < count
            kept = (place + share).to(tl.int64) * (KV_HEADS * width * GROUPS) + program
            peaks_here = tl.load(peaks + kept * 2, mask=there, other=LEAST)
            totals = tl.load(peaks + kept * 2 + 1, mask=there, other=0.0)
            inside = there[:, None] & (column < DIM)[None, :]
            parts = tl.load(partial + kept[:, None] * DIM + column[None, :], mask=inside, other=0.0)
            new_peak = tl.maximum(peak, tl.max(peaks_here, axis=0))
            weights, fade = tl.exp2(peaks_here - new_peak), tl.exp2(peak - new_peak)
            whole = whole * fade + tl.sum(totals * weights, axis=0)
            sums = sums * fade + tl.sum(parts * weights[:, None], axis=0)
            peak = new_peak
        result = (first + row // GROUPS).to(tl.int64) * (KV_HEADS * GROUPS) + kv_head * GROUPS + row % GROUPS
        mean = sums / tl.where(whole > 0, whole, 1.0)
        tl.store(out + result * DIM + column, mean.to(out.dtype.element_ty), mask=live & (column < DIM))


class Sums(NamedTuple):
    """Partial sums of cut requests' shares, float32: weighted V [places * rows, D]; peaks with totals [places * rows,
    2]. merges: int32, the number of cut requests, then for each its index, first place and number of shares."""

    partial: Tensor
    peaks: Tensor
    merges: Tensor


def places(requests: int, shares: int) -> int:
    """Return the largest number of shares of cut requests: ``shares - 1`` requests and as many further shares."""
    return min(2 * (shares - 1), requests + shares - 1)


def sums_for(requests: int, shares: int, rows: int, dim: int, device: torch.device) -> Sums:
    """Allocate the sums of ``rows`` (of all heads) for each share of a cut request."""
    kept = places(requests, shares) * rows
    return Sums(
        torch.empty(kept, dim, dtype=torch.float32, device=device),
        torch.empty(kept, 2, dtype=torch.float32, device=device),
        torch.empty(1 + 3 * min(requests, shares - 1), dtype=torch.int32, device=device),
    )


def merge(sums: Sums, out: Tensor, width: int, kv_heads: int, columns: int, qo_indptr: Tensor | None = None) -> None:
    """Merge the sums of cut requests into their rows of ``out`` [rows, Hq, D]. width: rows of each request, or with
    ``qo_indptr`` the most."""
    heads, dim = out.shape[1:]
    cut = (len(sums.merges) - 1) // 3
    _merge_shares_kernel[(width * heads, min(cut, MERGERS))](
        *sums,
        qo_indptr,
        out,
        width,
        GROUPS=heads // kv_heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        SHARES=max(1, min(32, MERGED // columns)),
        COLUMNS=columns,
        num_warps=4,
    )

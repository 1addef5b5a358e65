# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Routing statistics in one read of the logits.

Each thread owns whole groups of ``WIDE`` neighbouring logits (one 16-byte load), and keeps one state for each
lane of groups: the running maximum, the sums relative to it, and the group that holds the maximum. Keeping the
group costs one select per logit; the index of the maximum inside the group is worked out once, after the loop,
instead of being tracked for each logit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.triton_kernels.launch import multiprocessors, power_of_two

LANES = 512
WARPS = 4
PROGRAMS_PER_MULTIPROCESSOR = 4

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_MASKED = tl.constexpr(-1e30)
# exp2(-200) is 0 in float32, and 0 * -200 is 0 where 0 * -inf would be NaN.
_FAR = tl.constexpr(-200.0)


@triton.jit
def _absorb(x, start, lane, peak, total, moment, group, group_start, WIDE: tl.constexpr):
    """Add a tile of logits to each lane's running state; the sums are in base-2 units relative to ``peak``."""
    tile_peak = tl.max(x, axis=1)
    new_peak = tl.maximum(peak, tile_peak)
    shift = (peak - new_peak) * _LOG2E
    exponent = tl.maximum(x * _LOG2E - (new_peak * _LOG2E)[:, None], _FAR)
    weight = tl.exp2(exponent)
    scale = tl.exp2(shift)
    moment = scale * (moment + total * shift) + tl.sum(weight * exponent, axis=1)
    total = scale * total + tl.sum(weight, axis=1)
    better = tile_peak > peak
    group = tl.where(better[:, None], x, group)
    group_start = tl.where(better, start + lane * WIDE, group_start)
    return new_peak, total, moment, group, group_start


@triton.jit
def _merge(peak, total, moment, index):
    """Merge a vector of states into one; the first index of the overall maximum wins."""
    overall = tl.max(peak, axis=0)
    shift = (peak - overall) * _LOG2E
    scale = tl.exp2(shift)
    merged_moment = tl.sum(scale * (moment + total * shift), axis=0)
    merged_total = tl.sum(scale * total, axis=0)
    winner = tl.min(tl.where(peak == overall, index, 2147483647), axis=0)
    return overall, merged_total, merged_moment, winner


@triton.jit
def _store_stats(row, peak, total, moment, index, entropy, top1, argmax):
    live = peak > _MASKED
    total = tl.where(live, total, 1.0)
    result = tl.log2(total) * _LN2 - _LN2 * moment / total
    tl.store(entropy + row, tl.where(live, tl.maximum(result, 0.0), 0.0))
    tl.store(top1 + row, tl.where(live, 1.0 / total, 0.0))
    tl.store(argmax + row, tl.where(live, index, 0).to(tl.int64))


@triton.jit(do_not_specialize=["splits"])
def _stats_kernel(
    logits,
    rows,
    entropy,
    top1,
    argmax,
    sums,
    indices,
    vocab,
    row_stride,
    slice_length,
    splits,
    HAS_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0)
    split = tl.program_id(1)
    source = tl.load(rows + row).to(tl.int64) if HAS_ROWS else row.to(tl.int64)
    base = logits + source * row_stride
    lane = tl.arange(0, LANES)
    item = tl.arange(0, WIDE)
    offset = lane[:, None] * WIDE + item[None, :]
    begin = split * slice_length
    end = tl.minimum(begin + slice_length, vocab)
    whole = begin + (end - begin) // (LANES * WIDE) * (LANES * WIDE)

    peak = tl.full([LANES], _MASKED, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    group = tl.full([LANES, WIDE], float("-inf"), tl.float32)
    group_start = tl.zeros([LANES], tl.int32)
    # Whole tiles need no mask, and a mask that does not align with the loads would break them up.
    for start in range(begin, whole, LANES * WIDE):
        x = tl.load(base + start + offset).to(tl.float32)
        peak, total, moment, group, group_start = _absorb(x, start, lane, peak, total, moment, group, group_start, WIDE)
    if whole < end:
        x = tl.load(base + whole + offset, mask=whole + offset < end, other=float("-inf")).to(tl.float32)
        peak, total, moment, group, group_start = _absorb(x, whole, lane, peak, total, moment, group, group_start, WIDE)

    first = tl.min(tl.where(group == peak[:, None], item[None, :], WIDE), axis=1)
    peak, total, moment, index = _merge(peak, total, moment, group_start + first)
    if SPLIT:
        partial = row * splits + split
        tl.store(sums + partial * 3, peak)
        tl.store(sums + partial * 3 + 1, total)
        tl.store(sums + partial * 3 + 2, moment)
        tl.store(indices + partial, index)
    else:
        _store_stats(row, peak, total, moment, index, entropy, top1, argmax)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(entropy, top1, argmax, sums, indices, splits, SPLITS: tl.constexpr):
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    used = split < splits
    partial = row * splits + split
    peak = tl.load(sums + partial * 3, mask=used, other=_MASKED)
    total = tl.load(sums + partial * 3 + 1, mask=used, other=0.0)
    moment = tl.load(sums + partial * 3 + 2, mask=used, other=0.0)
    index = tl.load(indices + partial, mask=used, other=2147483647)
    peak, total, moment, index = _merge(peak, total, moment, index)
    _store_stats(row, peak, total, moment, index, entropy, top1, argmax)


def routing_stats(logits: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute entropy, top-1 probability and argmax of each softmax; see `whiflash_kernels.routing.routing_stats`."""
    count, vocab = logits.shape[0] if rows is None else rows.shape[0], logits.shape[1]
    device = logits.device
    entropy, top1 = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(2))
    stats = entropy, top1, torch.empty(count, dtype=torch.int64, device=device)
    if count == 0:
        return stats
    aligned = (logits.data_ptr() | logits.stride(0) * logits.element_size()) % 16 == 0
    # A group that is not aligned to 16 bytes could not be loaded at once, and Triton would spread it over threads.
    wide = 16 // logits.element_size() if aligned else 1
    tiles = triton.cdiv(vocab, LANES * wide)
    wanted = triton.cdiv(multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR, count)
    slice_length = triton.cdiv(tiles, min(tiles, wanted)) * LANES * wide
    splits = triton.cdiv(vocab, slice_length)
    sums = torch.empty(count, splits, 3, dtype=torch.float32, device=device) if splits > 1 else None
    indices = torch.empty(count, splits, dtype=torch.int32, device=device) if splits > 1 else None
    _stats_kernel[(count, splits)](
        logits,
        None if rows is None else rows.contiguous(),
        *stats,
        sums,
        indices,
        vocab,
        logits.stride(0),
        slice_length,
        splits,
        HAS_ROWS=rows is not None,
        SPLIT=splits > 1,
        LANES=LANES,
        WIDE=wide,
        num_warps=WARPS,
    )
    if splits > 1:
        _merge_kernel[(count,)](*stats, sums, indices, splits, SPLITS=power_of_two(splits), num_warps=1)
    return stats

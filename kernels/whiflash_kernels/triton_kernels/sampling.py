# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Samples a token for every verified row in two launches, without a sort; three launches before apply penalties."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.structs import SamplingTable
from whiflash_kernels.triton_kernels.launch import lanes, multiprocessors, power_of_two

TILE = 4096
SCAN_WARPS, PICK_WARPS = 8, 16
PROGRAMS_PER_MULTIPROCESSOR = 2

_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)
"""Start of a running maximum; relative to it -inf has mass 0 and is no NaN."""


@triton.jit
def _request(row, qo_indptr, seq_lens, request_slots, requests, SLOTS: tl.constexpr):
    """Return a packed row's request slot (0 without a request), its position, and its request's first row."""
    request = tl.arange(0, SLOTS)
    ends = tl.load(qo_indptr + 1 + request, mask=request < requests, other=2147483647)
    owner = tl.sum((ends <= row).to(tl.int32), axis=0)
    inside = owner < requests
    slot = tl.load(request_slots + owner, mask=inside, other=0).to(tl.int64)
    begin = tl.load(qo_indptr + owner, mask=inside, other=0)
    position = tl.load(seq_lens + owner, mask=inside, other=0).to(tl.int64) + row - begin
    return slot, position, begin


@triton.jit
def _keys(seed, position):
    z = seed.to(tl.uint64) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32) | 1


@triton.jit
def _noise(token, key, factor):
    """Return the base-2 logarithm of a token's exponentially distributed noise."""
    h = token.to(tl.uint32) * factor + key
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    uniform = ((h & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    # For small u, -ln(1 - u) would lose digits, so the series is used.
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.3333333333 + uniform * 0.25)))
    direct = -tl.log(tl.maximum(1.0 - uniform, 1e-8))
    return tl.log2(tl.where(uniform < 0.015625, series, direct))


@triton.jit
def _values(base, words, token, end, MASKED: tl.constexpr):
    inside = token < end
    x = tl.load(base + token, mask=inside, other=float("-inf")).to(tl.float32)
    if MASKED:
        word = tl.load(words + token // 32, mask=inside, other=0)
        x = tl.where((word >> (token % 32)) & 1 != 0, x, float("-inf"))
    return tl.where(x == x, x, float("-inf"))


@triton.jit(do_not_specialize=["requests", "splits"])
def _scan_kernel(
    logits,
    qo_indptr,
    seq_lens,
    request_slots,
    parameters,
    seeds,
    masks,
    mask_of_row,
    sums,
    best,
    requests,
    vocab,
    row_stride,
    mask_stride,
    slice_length,
    splits,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    slot, position, _ = _request(row, qo_indptr, seq_lens, request_slots, requests, SLOTS)
    if slot == 0:
        return
    drawn = tl.load(parameters + slot * 4 + 1) > 1.0
    scale = _LOG2E / tl.load(parameters + slot * 4)
    key, factor = _keys(tl.load(seeds + slot), position)
    base, words = logits + row * row_stride, masks
    if MASKED:
        words += tl.load(mask_of_row + row) * mask_stride
    lane = tl.arange(0, TILE)
    begin = split * slice_length
    end = tl.minimum(begin + slice_length, vocab)
    score = tl.full([TILE], float("-inf"), tl.float32)
    token = tl.zeros([TILE], tl.int32)
    peak = tl.full([TILE], _LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for start in range(begin, end, TILE):
        each = start + lane
        x = _values(base, words, each, end, MASKED)
        own = x
        if drawn:
            y = x * scale
            own = y - _noise(each, key, factor)
            higher = tl.maximum(peak, y)
            total = total * tl.exp2(peak - higher) + tl.exp2(y - higher)
            peak = higher
        better = own > score
        score = tl.where(better, own, score)
        token = tl.where(better, each, token)
    highest = tl.max(peak, axis=0)
    top = tl.max(score, axis=0)
    partial = row * splits + split
    tl.store(sums + partial * 3, highest)
    tl.store(sums + partial * 3 + 1, tl.sum(total * tl.exp2(peak - highest), axis=0))
    tl.store(sums + partial * 3 + 2, top)
    tl.store(best + partial, tl.min(tl.where(score == top, token, 2147483647), axis=0))


@triton.jit
def _reaching(x, least):
    """Whether each x is at least the number whose order-preserving bits are ``least``."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0.0 the same zero
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >= least


@triton.jit
def _mass_of_likeliest(base, words, vocab, scale, peak, top_k, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Return the mass of the tokens with fewer than top_k likelier ones; bisection finds the least likely of them."""
    lane = tl.arange(0, TILE)
    # At least top_k tokens reach ``low``, which begins at -inf; fewer reach ``high``, which begins above +inf.
    low, high = tl.full([], -2139095041, tl.int32), tl.full([], 2139095041, tl.int32)
    while low + 1 < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        count = tl.zeros([TILE], tl.int32)
        for start in range(0, vocab, TILE):
            each = start + lane
            x = _values(base, words, each, vocab, MASKED)
            count += ((each < vocab) & _reaching(x, middle)).to(tl.int32)
        found = tl.sum(count, axis=0)
        low = tl.where(found >= top_k, middle, low)
        high = tl.where(found > top_k, high, tl.where(found == top_k, low + 1, middle))
    mass = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        x = _values(base, words, start + lane, vocab, MASKED)
        mass += tl.where(_reaching(x, low), tl.exp2(x * scale - peak), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit(do_not_specialize=["requests", "splits"])
def _pick_kernel(
    logits,
    qo_indptr,
    seq_lens,
    request_slots,
    parameters,
    seeds,
    masks,
    mask_of_row,
    sums,
    best,
    tokens,
    requests,
    vocab,
    row_stride,
    mask_stride,
    splits,
    SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot, position, _ = _request(row, qo_indptr, seq_lens, request_slots, requests, SLOTS)
    if slot == 0:
        tl.store(tokens + row, slot)
        return
    split = tl.arange(0, SPLITS)
    used = split < splits
    partial = row * splits + split
    peaks = tl.load(sums + partial * 3, mask=used, other=_LOWEST)
    totals = tl.load(sums + partial * 3 + 1, mask=used, other=0.0)
    scores = tl.load(sums + partial * 3 + 2, mask=used, other=float("-inf"))
    candidates = tl.load(best + partial, mask=used, other=2147483647)
    peak = tl.max(peaks, axis=0)
    total = tl.sum(totals * tl.exp2(peaks - peak), axis=0)
    top = tl.max(scores, axis=0)
    token = tl.min(tl.where(scores == top, candidates, 2147483647), axis=0)

    scale = _LOG2E / tl.load(parameters + slot * 4)
    top_k = tl.load(parameters + slot * 4 + 1)
    top_p = tl.load(parameters + slot * 4 + 2)
    min_p = tl.load(parameters + slot * 4 + 3)
    key, factor = _keys(tl.load(seeds + slot), position)
    base, words = logits + row * row_stride, masks
    if MASKED:
        words += tl.load(mask_of_row + row) * mask_stride
    lane = tl.arange(0, TILE)
    pending = (top_k > 1.0) & ((top_k < vocab) | (top_p < 1.0) | (min_p != 0.0))
    if pending & (min_p < 0.0) & (top_k < vocab) & (top_p < 1.0):
        total = _mass_of_likeliest(base, words, vocab, scale, peak, top_k, TILE // 2, MASKED)
    while pending:
        x_of_token = tl.load(base + token).to(tl.float32)
        mass = tl.zeros([TILE], tl.float32)
        count = tl.zeros([TILE], tl.int32)
        score = tl.full([TILE], float("-inf"), tl.float32)
        next_token = tl.zeros([TILE], tl.int32)
        for start in range(0, vocab, TILE):
            each = start + lane
            x = _values(base, words, each, vocab, MASKED)
            if tl.max(x, axis=0) > x_of_token:
                likelier = x > x_of_token
                y = x * scale
                mass += tl.where(likelier, tl.exp2(y - peak), 0.0)
                count += likelier.to(tl.int32)
                own = tl.where(likelier, y - _noise(each, key, factor), float("-inf"))
                better = own > score
                score = tl.where(better, own, score)
                next_token = tl.where(better, each, next_token)
        above = tl.sum(count, axis=0)
        kept = (above < top_k) & ((top_p >= 1.0) | (tl.sum(mass, axis=0) <= top_p * total))
        kept = kept & (tl.exp2(x_of_token * scale - peak) >= tl.abs(min_p))
        highest = tl.max(score, axis=0)
        # A finite logit may become -inf when it is scaled; then no token has a score above -inf.
        pending = (above > 0) & (kept == 0) & (highest > float("-inf"))
        following = tl.min(tl.where(score == highest, next_token, 2147483647), axis=0)
        token = tl.where(pending, following, token)
    tl.store(tokens + row, token.to(tl.int64))


def sample_rows(
    logits: Tensor,
    qo_indptr: Tensor,
    seq_lens: Tensor,
    request_slots: Tensor,
    table: SamplingTable,
    *,
    masks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Draw a token for each packed row of logits; see `whiflash_kernels.sampling.sample_rows`."""
    (count, vocab), device = logits.shape, logits.device
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    if count == 0:
        return tokens
    tiles = triton.cdiv(vocab, TILE)
    wanted = triton.cdiv(multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR, count)
    slice_length = triton.cdiv(tiles, min(tiles, wanted)) * TILE
    splits = triton.cdiv(vocab, slice_length)
    sums = torch.empty(count, splits, 3, dtype=torch.float32, device=device)
    best = torch.empty(count, splits, dtype=torch.int32, device=device)
    bits, of_row = (None, None) if masks is None else masks
    read = (
        logits,
        qo_indptr.contiguous(),
        seq_lens.contiguous(),
        request_slots.contiguous(),
        *table,
        bits,
        None if of_row is None else of_row.contiguous(),
        sums,
        best,
    )
    sizes = len(request_slots), vocab, logits.stride(0), 0 if bits is None else bits.stride(0)
    constants = {"SLOTS": lanes(len(request_slots)), "TILE": TILE, "MASKED": bits is not None}
    most = power_of_two(tiles)  # of tiles, not splits, which vary: a kernel is compiled for each
    _scan_kernel[(count, splits)](*read, *sizes, slice_length, splits, **constants, num_warps=SCAN_WARPS)
    _pick_kernel[(count,)](*read, tokens, *sizes, splits, **constants, SPLITS=most, num_warps=PICK_WARPS)
    return tokens


@triton.jit
def _clear_kernel(request_slots, places, counts, vocab, TILE: tl.constexpr):
    slot = tl.load(request_slots + tl.program_id(0)).to(tl.int64)
    place = tl.load(places + slot * 4)
    if place >= 0:
        token = tl.program_id(1) * TILE + tl.arange(0, TILE)
        tl.store(counts + place * vocab + token, tl.zeros([TILE], tl.int32), mask=token < vocab)


@triton.jit
def _count_kernel(seq_lens, request_slots, places, text, counts, vocab, text_stride, TILE: tl.constexpr):
    request = tl.program_id(0)
    slot = tl.load(request_slots + request).to(tl.int64)
    place = tl.load(places + slot * 4)
    if place < 0:
        return
    length = tl.load(seq_lens + request).to(tl.int64)
    position = tl.load(places + slot * 4 + 2) + tl.program_id(1) * TILE + tl.arange(0, TILE)
    token = tl.load(text + slot * text_stride + position, mask=position <= length, other=-1)
    tl.atomic_add(counts + place * vocab + token, 1, mask=(token >= 0) & (token < vocab))


@triton.jit(do_not_specialize=["requests"])
def _penalise_kernel(
    logits,
    input_ids,
    qo_indptr,
    seq_lens,
    request_slots,
    factors,
    places,
    bias,
    counts,
    requests,
    vocab,
    row_stride,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot, position, begin = _request(row, qo_indptr, seq_lens, request_slots, requests, SLOTS)
    place = tl.load(places + slot * 4)
    if place < 0:
        return
    is_short = position + 1 < tl.load(places + slot * 4 + 3)
    added = bias + tl.where(is_short, tl.load(places + slot * 4 + 1), place) * vocab
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = token < vocab
    count = tl.load(counts + place * vocab + token, mask=inside, other=0)
    for draft in range(begin + 1, row + 1):
        count += (tl.load(input_ids + draft) == token).to(tl.int32)
    x = tl.load(logits + row * row_stride + token, mask=inside, other=0.0).to(tl.float32)
    x -= count.to(tl.float32) * tl.load(factors + slot * 3)
    x -= tl.where(count > 0, tl.load(factors + slot * 3 + 1), 0.0)
    repetition = tl.load(factors + slot * 3 + 2)
    x = tl.where(count > 0, tl.where(x < 0, x * repetition, x / repetition), x)
    x += tl.load(added + token, mask=inside, other=0.0)
    tl.store(logits + row * row_stride + token, x, mask=inside)


def penalise_rows(logits, input_ids, qo_indptr, seq_lens, request_slots, text, table):
    """Apply penalties and biases to packed logits in place; see `whiflash_kernels.sampling.penalise_rows`."""
    (rows, vocab), requests = logits.shape, len(request_slots)
    if not rows or not requests:
        return
    lengths, slots = seq_lens.contiguous(), request_slots.contiguous()
    grid = requests, triton.cdiv(vocab, TILE)
    _clear_kernel[grid](slots, table.places, table.counts, vocab, TILE=TILE, num_warps=8)
    texts = triton.cdiv(text.shape[1], TILE)
    counted = lengths, slots, table.places, text, table.counts, vocab, text.stride(0)
    _count_kernel[(requests, texts)](*counted, TILE=TILE, num_warps=8)
    read = logits, input_ids, qo_indptr.contiguous(), lengths, slots, *table
    sizes, constants = (requests, vocab, logits.stride(0)), {"SLOTS": lanes(requests), "TILE": TILE}
    _penalise_kernel[(rows, triton.cdiv(vocab, TILE))](*read, *sizes, **constants, num_warps=8)

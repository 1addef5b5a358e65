# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Copying on the device: one program a request finds the places, one judges them.

Texts are walked from their end, since the newest places win: a text that copies is left after its first tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.structs import MOST_MATCHED, PLACES, SURE, Drafts
from whiflash_kernels.triton_kernels.launch import power_of_two

TILE = 1024
"""Number of places that one step back through a text compares."""

_SURE = tl.constexpr(SURE)


@triton.jit
def _newest(matches, place, found, out, MOST: tl.constexpr):
    """Append the places that match, newest first, while there is room. Return the number of all matches so far."""
    order = found + tl.cumsum(matches.to(tl.int32), 0) - 1
    tl.store(out + order, place.to(tl.int64), mask=matches & (order < MOST))
    return found + tl.sum(matches.to(tl.int32), 0)


@triton.jit
def _find_places_kernel(
    tokens,
    request_slots,
    seq_lens,
    counts,
    twos,
    ones,
    tokens_row,
    MOST: tl.constexpr,
    TILE: tl.constexpr,
    BEHIND: tl.constexpr,
):
    request = tl.program_id(0)
    length = tl.load(seq_lens + request).to(tl.int32) + 1
    if BEHIND:
        length += tl.load(counts + request).to(tl.int32)
    text = tokens + tl.load(request_slots + request).to(tl.int64) * tokens_row
    last = tl.load(text + length - 1, mask=length > 0, other=-1)
    second = tl.load(text + length - 2, mask=length > 1, other=-1)
    slot = tl.arange(0, MOST)
    tl.store(twos + request * MOST + slot, tl.zeros([MOST], tl.int64))
    tl.store(ones + request * MOST + slot, tl.zeros([MOST], tl.int64))
    tl.debug_barrier()  # the zeros come before the places that replace them
    found_twos, found_ones, newest = 0, 0, length - 1
    while (newest > 0) & (found_twos < MOST):
        place = newest - tl.arange(0, TILE)
        one = (place > 0) & (tl.load(text + place - 1, mask=place > 0, other=-2) == last)
        two = one & (place > 1) & (tl.load(text + place - 2, mask=place > 1, other=-2) == second)
        found_twos = _newest(two, place, found_twos, twos + request * MOST, MOST)
        found_ones = _newest(one, place, found_ones, ones + request * MOST, MOST)
        newest -= TILE


@triton.jit(
    do_not_specialize=["min_match", "alive_row"], do_not_specialize_on_alignment=["factors", "chances", "alive"]
)
def _judge_places_kernel(
    tokens,
    request_slots,
    seq_lens,
    back,
    limits,
    counts,
    alive,
    factors,
    chances,
    boundaries,
    twos,
    ones,
    out,
    out_alive,
    copied,
    out_matched,
    out_agreements,
    worth,
    min_match,
    tokens_row,
    alive_row,
    MOST: tl.constexpr,
    PADDED: tl.constexpr,
    BACK: tl.constexpr,
    WIDTH: tl.constexpr,
    BUCKETS: tl.constexpr,
    PADDED_BUCKETS: tl.constexpr,
    BEHIND: tl.constexpr,
):
    request = tl.program_id(0)
    slot = tl.load(request_slots + request).to(tl.int64)
    text = tokens + slot * tokens_row
    length = tl.load(seq_lens + request).to(tl.int64) + 1
    limit = tl.load(limits + request).to(tl.int64)
    chance = 1.0
    if BEHIND:
        drafts = tl.load(counts + request)
        length += drafts
        limit = tl.where(drafts > 0, limit - drafts, 0)
        chance = tl.load(alive + request.to(tl.int64) * alive_row + tl.maximum(drafts - 1, 0))
    last = tl.load(back + slot)
    source = tl.where((last > 0) & (last < length), length - last, 0)

    # Place 0 continues the last copy.
    index = tl.arange(0, PADDED)
    listed = (index > 0) & (index <= MOST)
    any_two = tl.load(twos + request * MOST) > 0
    place = tl.load(twos + request * MOST + index - 1, mask=listed & any_two, other=0)
    place += tl.load(ones + request * MOST + index - 1, mask=listed & (any_two == 0), other=0)
    place = tl.where(index == 0, source, tl.where(place == source, 0, place))

    before = tl.arange(0, BACK) + 1
    here = place[:, None] - before[None, :]
    there = length - before
    known = (here >= 0) & (there >= 0)[None, :]
    equal = tl.load(text + here, mask=known, other=-1) == tl.load(text + there, mask=there >= 0, other=-2)[None, :]
    matched = tl.min(tl.where(known & equal, BACK, before[None, :] - 1), axis=1)
    matched = tl.where((place > 0) & (matched >= min_match), matched, 0)

    longest = tl.max(matched, axis=0)
    best = tl.min(tl.where(matched == longest, index, PADDED), axis=0)
    chosen = tl.sum(tl.where(index == best, place, 0), axis=0)
    period = tl.maximum(length - place, 1)
    following = matched > 0
    going = longest > 0
    count = 0
    bucket_index = tl.arange(0, PADDED_BUCKETS)
    boundary = tl.load(boundaries + bucket_index, mask=bucket_index < BUCKETS, other=2147483647)
    for depth in range(WIDTH):
        proposed = tl.load(text + place + depth % period, mask=following, other=-1)
        token = tl.sum(tl.where(index == best, proposed, 0), axis=0)
        same = following & (proposed == token)
        with_it = tl.max(tl.where(same, matched, 0), axis=0)
        without = tl.max(tl.where(following & (same == 0), matched, 0), axis=0)
        alone = tl.sum(following.to(tl.int32), axis=0) == 1
        agreement = tl.where(alone, 0, tl.where(without == 0, 1, tl.where(with_it > without, 2, 3)))
        bucket = tl.maximum(tl.sum((boundary <= longest + depth).to(tl.int32), axis=0) - 1, 0)
        right = tl.load(chances + (request * BUCKETS + bucket) * 4 + agreement)
        if depth == 0:
            right *= tl.load(factors + request)
        chance *= tl.minimum(right, _SURE)
        worthy = chance >= worth
        if not BEHIND:
            worthy = worthy | (depth == 0)
        going = going & (depth < limit) & worthy & (token >= 0)
        tl.store(out + request * WIDTH + depth, tl.where(going, token, 0))
        tl.store(out_alive + request * WIDTH + depth, tl.where(going, chance, 0.0))
        tl.store(out_agreements + request * WIDTH + depth, tl.where(going, agreement, 0))
        count += going.to(tl.int32)
        following = same
    tl.store(copied + request, count)
    tl.store(out_matched + request, longest.to(tl.int64))
    if not BEHIND:
        tl.store(back + slot, tl.where(longest > 0, length - chosen, last))


def propose_copies(
    tokens: Tensor,
    request_slots: Tensor,
    seq_lens: Tensor,
    back: Tensor,
    limits: Tensor,
    factors: Tensor,
    chances: Tensor,
    boundaries: Tensor,
    *,
    width: int,
    worth: float,
    min_match: int = 1,
    behind: tuple[Tensor, Tensor] | None = None,
) -> Drafts:
    """Propose the tokens after an earlier match of each text's end; see `whiflash_kernels.copies.propose_copies`."""
    requests, device = request_slots.shape[0], tokens.device
    integers = [(requests, width), (requests,), (requests,), (requests, PLACES), (requests, PLACES)]
    out, copied, matched, twos, ones = (torch.empty(*size, dtype=torch.int64, device=device) for size in integers)
    out_alive = torch.empty(requests, width, dtype=torch.float32, device=device)
    agreements = torch.empty(requests, width, dtype=torch.int32, device=device)
    copies = Drafts(out, copied, out_alive, matched=matched, agreements=agreements)
    if requests == 0:
        return copies
    slots, lengths = request_slots.contiguous(), seq_lens.contiguous()
    # Without drafts any pointer will do: the kernels do not read it.
    counts, alive = (slots, factors[:, None]) if behind is None else (behind[0].contiguous(), behind[1])
    _find_places_kernel[(requests,)](
        tokens,
        slots,
        lengths,
        counts,
        twos,
        ones,
        tokens.stride(0),
        MOST=PLACES,
        TILE=TILE,
        BEHIND=behind is not None,
        num_warps=4,
    )
    buckets = boundaries.shape[0]
    _judge_places_kernel[(requests,)](
        tokens,
        slots,
        lengths,
        back,
        limits.contiguous(),
        counts,
        alive,
        factors.contiguous(),
        chances.contiguous(),
        boundaries.contiguous(),
        twos,
        ones,
        out,
        out_alive,
        copied,
        matched,
        agreements,
        worth,
        min_match,
        tokens.stride(0),
        alive.stride(0),
        MOST=PLACES,
        PADDED=power_of_two(PLACES + 1),
        BACK=MOST_MATCHED,
        WIDTH=width,
        BUCKETS=buckets,
        PADDED_BUCKETS=power_of_two(buckets),
        BEHIND=behind is not None,
        num_warps=1,
    )
    return copies

"""Samples a token for every verified row: the likeliest, or a draw with noise fixed by request and position.

Noise is a function of a request's seed, a position and a token. So a row that was rejected is drawn again with the same
noise, and a graph replays the draw. A text does not depend on what was drafted or who was served beside it. Penalties
and biases change the logits before (`penalise_rows`).
"""

from math import log
from typing import Any

import torch
from torch import Tensor

from whiflash_kernels.dispatch import op
from whiflash_kernels.routing import check_logits
from whiflash_kernels.structs import PenaltyTable, SamplingTable

GREEDY = 1
"""Largest top_k of a greedy request, which takes the likeliest token."""
FEWEST_SORTED = 64
"""Number of likeliest columns that are sorted first; more are sorted only if a row keeps more."""
LEAST = 1e-8
"""Smallest value of 1 - u, u uniform noise, whose logarithm is taken."""


def _check(logits: Tensor, *_: Any, masks: tuple[Tensor, Tensor] | None = None, **__: Any) -> None:
    check_logits(logits)
    if masks is not None and masks[0].shape[1] * 32 < logits.shape[1]:
        raise ValueError(f"masks of {masks[0].shape[1]} words are too short for {logits.shape[1]} tokens")


@op(_check)
def sample_rows(
    logits: Tensor,
    qo_indptr: Tensor,
    seq_lens: Tensor,
    request_slots: Tensor,
    table: SamplingTable,
    *,
    masks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Draw a token for each packed row under the parameters of its request.

    Row t belongs to request b with qo_indptr[b] <= t < qo_indptr[b + 1] and slot s = request_slots[b], and is at
    position p = seq_lens[b] + t - qo_indptr[b]. If top_k <= 1 its token is the first v of the largest
    x = logits[t, v]. Else it is the v that maximises x / temperature - ln E(seed of s, p, v) among those kept, with E
    independent and exponentially distributed: a draw from softmax(x / temperature) over what is kept (the Gumbel-max
    trick). Token v is kept if fewer than top_k tokens are likelier, if the likelier ones have at most the share top_p
    of the mass, and if its chance is at least |min_p| of the likeliest's. The mass is that of all tokens, or with
    min_p < 0 that of the tokens that top_k keeps. So equally likely tokens are kept or left out together.

    Args:
        logits: [T, V] bf16, fp16 or fp32, last dimension contiguous; read only. A row with NaN or +inf may give any
            token.
        qo_indptr: [B + 1] int32 (or int64).
        seq_lens: [B] int64 or int32.
        request_slots: [B] int64 or int32; 0: no request.
        table: by request slot.
        masks: [M, >= V / 32] int32, of which bit v % 32 of word v // 32 allows token v, and [T] int64, which of them
            each row has.

    Returns:
        [T] int64; 0 for a row of no request, or whose logits are all -inf.

    Raises:
        ValueError: ``logits`` is not two-dimensional, is not contiguous along the vocabulary, or V is 0; a mask is too
            short.

    Grid: (T, splits), each program reads one slice of a row once; then (T), which merges the slices. If tokens may be
    left out, it reads the row again for its token: while that is not kept, the best of the likelier ones replaces it.
    With min_p < 0, top_k and top_p it first bisects for the mass of what top_k keeps. Rows of no request are not read.
    Graph-capturable.
    Numerics: float32; noise of 31 bits, dense near 0.
    Fallback: torch (a sort of the likeliest columns).
    Compared: SGLang samples in some 10 launches, sorts whole rows or draws with a state of the host
    (FlashInfer's ``top_k_top_p_sampling_from_probs``, whose rejections the second launch resembles), and reads padding.
    Source: Gumbel-max; rejection of pivots, FlashInfer; hash ``lowbias32`` of "hash-prospector"; SplitMix64.
    """
    tokens = logits.new_zeros(logits.shape[0], dtype=torch.int64)
    rows = torch.arange(logits.shape[0], device=logits.device)
    if len(rows) == len(request_slots) and qo_indptr.tolist() == list(range(len(rows) + 1)):
        owner, slots = rows, request_slots.long()  # One row per request: the fast path, as in block.py.
    else:
        owner = torch.bucketize(rows, qo_indptr[1:], right=True)
        inside = owner < len(request_slots)
        owner = owner.clamp_max_(len(request_slots) - 1) if len(request_slots) else owner
        slots = request_slots[owner].long() * inside if len(request_slots) else owner
    greedy = table.parameters[slots, 1] <= GREEDY
    live = slots != 0
    if masks is None and bool((greedy & live).all()):
        return logits.argmax(-1)
    chosen = live.nonzero().squeeze(1)
    if not len(chosen):
        return tokens
    x = logits[chosen].float()
    if masks is not None:
        words = masks[0][masks[1][chosen]]
        bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
        x.masked_fill_(bits.flatten(1)[:, : x.shape[1]] == 0, -torch.inf)
    tokens[chosen] = x.argmax(-1)
    of_drawn = (~greedy[chosen]).nonzero().squeeze(1)
    if len(of_drawn):
        drawn, slots = chosen[of_drawn], slots[chosen[of_drawn]]
        position = seq_lens[owner[drawn]].long() + rows[drawn] - qo_indptr[owner[drawn]]
        x = x if len(of_drawn) == len(chosen) else x[of_drawn]
        tokens[drawn] = _drawn(x, table.parameters[slots], table.seeds[slots], position)
    return tokens


def _drawn(x: Tensor, parameters: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw tokens [R] int64 from x [R, V], which is overwritten. parameters: [R, 4]. seeds, positions: [R] int64."""
    temperature, top_k, top_p, min_p = parameters.unbind(1)
    largest = x.max(dim=1, keepdim=True).values
    x -= largest.clamp_min(torch.finfo(x.dtype).min)
    x /= temperature[:, None]
    size, ids = x.shape[1], None
    cuts = (top_k < size) | (top_p < 1) | (min_p != 0)
    if bool(cuts.any()):
        total = x.exp().sum(dim=1, keepdim=True) if bool((top_p < 1).any()) else x.new_ones(len(x), 1)
        if len(rows := ((min_p < 0) & (top_k < size) & (top_p < 1)).nonzero().squeeze(1)):
            some, last = x[rows], top_k[rows, None].long() - 1
            least = some.sort(dim=1, descending=True).values.gather(1, last)
            total[rows] = some.exp().masked_fill_(some < least, 0.0).sum(dim=1, keepdim=True)
        columns = min(FEWEST_SORTED, size)
        while True:
            found = x.topk(columns, dim=1) if columns < size else x.sort(dim=1, descending=True)
            least = _least_kept(found.values, total, parameters)
            # If the last sorted column is still kept, further ones may be as likely, so more are sorted.
            if columns == size or bool((least > found.values[:, -1]).all()):
                break
            columns = min(16 * columns, size)
        kept = found.values >= least[:, None]
        most = max(int(kept.sum(dim=1).max()), 1)  # a row with NaN keeps no token
        ids = found.indices[:, :most]
        x = found.values[:, :most].masked_fill(~kept[:, :most], -torch.inf)
    best = (x - exponential(seeds, positions, size, ids).log_()).argmax(dim=1, keepdim=True)
    token = best if ids is None else ids.gather(1, best)
    return token.masked_fill_(largest == -torch.inf, 0).squeeze(1)


def _least_kept(x: Tensor, total: Tensor, parameters: Tensor) -> Tensor:
    """Return the lowest log-chance that top_k, top_p and min_p keep, [R].

    Args:
        x: [R, C] log-chances relative to the first, descending. total: [R, 1], sum of all chances in the same unit.
    """
    _, top_k, top_p, min_p = (each[:, None] for each in parameters.unbind(1))
    mass = x.exp()
    before = mass.cumsum(dim=1).sub_(mass)
    rank = torch.arange(x.shape[1], device=x.device)
    kept = (rank < top_k) & ((before <= top_p * total) | (top_p >= 1)) & (mass >= min_p.abs())
    return x.gather(1, kept.sum(dim=1, keepdim=True).sub_(1).clamp_min_(0)).squeeze(1)


def exponential(seeds: Tensor, positions: Tensor, vocabulary: int, ids: Tensor | None = None) -> Tensor:
    """Return the noise E of `sample_rows`, [R, V] float32, or only for the tokens ``ids`` [R, C].

    Args:
        seeds, positions: [R] int64.
    """
    if ids is None:
        ids = torch.arange(vocabulary, dtype=torch.int32, device=seeds.device)[None]
    key, factor = _keys(seeds, positions)
    h = ids.to(torch.int32) * factor[:, None]
    h += key[:, None]
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, None)):
        h ^= (h >> shift) & ((1 << (32 - shift)) - 1)
        if multiplier is not None:
            h *= multiplier
    uniform = (h & 0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)
    return uniform.neg_().log1p_().clamp_(min=log(LEAST)).neg_()


def _keys(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Hash each row's seed and position by SplitMix64 and return its 64 bits as two int32, the second made odd."""
    z = seeds + (positions + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        z = z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))
        if multiplier is not None:
            z = z * _signed(multiplier)
    return z.to(torch.int32), ((z >> 32) | 1).to(torch.int32)


def _signed(bits: int) -> int:
    return bits - (1 << 64)


def _check_penalties(logits: Tensor, *arguments: Any, **_: Any) -> None:
    check_logits(logits)
    if arguments[5].bias.shape[1] != logits.shape[1]:
        raise ValueError(f"a bias of {arguments[5].bias.shape[1]} tokens is not for {logits.shape[1]}")


@op(_check_penalties)
def penalise_rows(
    logits: Tensor,
    input_ids: Tensor,
    qo_indptr: Tensor,
    seq_lens: Tensor,
    request_slots: Tensor,
    text: Tensor,
    table: PenaltyTable,
) -> None:
    """Apply penalties and biases to the logits of packed rows in place, as plain decoding would at each position.

    Upstream's workers keep penalties constant over a block, or drop them. With rows, requests, slots, positions as in
    `sample_rows`, (place, early, answer, enough) = table.places[s] and c(v) the number of v among text[s, answer :
    seq_lens[b] + 1] and input_ids[qo_indptr[b] + 1 : t + 1]: where place >= 0, x = logits[t, v] becomes
    x - frequency c(v) - presence [c(v) > 0]. Then, where c(v) > 0, it is multiplied by repetition if it is below 0,
    else divided. Last bias[place, v] is added, or bias[early, v] while p + 1 < enough.

    Args:
        logits: [T, V] bf16, fp16 or fp32, last dimension contiguous.
        input_ids: [T] int64, contiguous; below 0 it is not counted.
        qo_indptr, seq_lens, request_slots: as in `sample_rows`.
        text: [slots, context] int64, last dimension contiguous.
        table: ``counts`` is written, in the places of these requests.

    Raises:
        ValueError: ``logits`` has another shape or layout, or another vocabulary than the table.

    Grid: (B, V / block), which clears counts; (B, context / block), which counts the text; then (T, V / block). Other
    rows are not read. Graph-capturable.
    Numerics: float32. Fallback: torch, request after request.
    """
    bounds, lengths, ids = qo_indptr.tolist(), seq_lens.tolist(), input_ids.tolist()
    for request, slot in enumerate(request_slots.tolist()):
        place, early, answer, enough = table.places[slot].tolist()
        begin, end = bounds[request], bounds[request + 1]
        if place < 0 or begin >= end:
            continue
        frequency, presence, repetition = table.factors[slot].tolist()
        rows = logits[begin:end]
        committed = torch.bincount(text[slot, answer : lengths[request] + 1], minlength=rows.shape[1])
        counts = committed.float().repeat(len(rows), 1)
        for row in range(begin + 1, end):
            if ids[row] >= 0:
                counts[row - begin :, ids[row]] += 1
        met = counts > 0
        x = rows.float() + counts.mul_(-frequency).sub_(met * presence)
        x = torch.where(met, torch.where(x < 0, x * repetition, x / repetition), x)
        short = min(max(enough - 1 - lengths[request], 0), len(rows))
        x[:short] += table.bias[early]
        x[short:] += table.bias[place]
        rows.copy_(x)

"""Copying on the device: what followed the earlier occurrences of a text's end, and how far to trust it."""

from typing import Any

import torch
from torch import Tensor

from whiflash_kernels.dispatch import op
from whiflash_kernels.structs import MOST_MATCHED, PLACES, SURE, Drafts


def check(tokens: Tensor, request_slots: Tensor, *rest: Tensor, width: int, **_: Any) -> None:
    """Raise ValueError for arguments of `propose_copies` that do not fit each other."""
    chances, boundaries = rest[-2:]
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    expected = (request_slots.shape[0], boundaries.shape[0], 4)
    if chances.shape != expected:
        raise ValueError(f"chances must be {expected}, got {tuple(chances.shape)}")


@op(check)
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
    """Propose for every request the tokens that followed an earlier occurrence of its text's last tokens.

    Request b's text is t = tokens[request_slots[b], :L], L = seq_lens[b] + 1: the bonus token is known. With
    ``behind`` = (counts, alive) the proposal follows counts[b] drafts, which the caller has written after the text:
    L = seq_lens[b] + 1 + counts[b]. A place s, 0 < s < L, matches by m(s), the largest m <= 32 with
    t[s - 1 - i] = t[L - 1 - i] for all i < m. The candidates are the newest 8 places with m >= 2 (without any, with
    m = 1), and the place where the last copy would go on, L - back[request_slots[b]]. Those with m < ``min_match`` are
    left out. The longest match is copied; of equal ones the last copy's place, then the newest. After the text's end a
    copy goes on with what it copied. It ends before a token below zero. Without ``behind`` back[request_slots[b]]
    becomes L - s where a place s was copied from.

    Token d's chance is chances[b, k, a]: k is the last bucket with boundaries[k] <= m + d. a compares the places that
    agreed on all tokens before: 0 if there is one place, 1 if all have this token, 2 if they differ and every longest
    match has it, 3 otherwise. The first is multiplied by factors[b]; none is above 0.995. With c(d) the product of the
    chances up to d, times that of the last draft with ``behind``, tokens are proposed as long as c(d) >= ``worth``, the
    first in any case without ``behind``; at most limits[b] of them. With ``behind`` that includes the drafts, and a
    request without drafts gets no proposal.

    Args:
        tokens: [slots, context] int64, last dimension contiguous.
        request_slots: [B] int64 or int32, pairwise different. seq_lens: [B] int64 or int32.
        back: [slots] int64, contiguous: how far back each request copied last, 0 before its first copy; written in
            place without ``behind``.
        limits: [B] int64 or int32.
        factors: [B] float32, multiply the chance of a copy's first token: how right this request's copies were.
        chances: [B, K, 4] float32, contiguous. boundaries: [K] int32, increasing, boundaries[0] <= 1.
        width: columns of the result, at least 1.
        behind: counts [B] int64 and alive [B, D] float32, last dimension contiguous, the chance of every draft and all
            before it, D at least 1.

    Returns:
        `Drafts` of no pass with chances, `Drafts.matched` and `Drafts.agreements`; tokens and chances are 0 past the
        counts.

    Raises:
        ValueError: ``width`` below 1, or ``chances`` does not fit ``boundaries`` and the batch.

    Grid: (B) twice: one program walks a request's text from its end until it has the places, one judges them.
    Capturable.
    Numerics: integers; chances in float32, multiplied in order.
    Fallback: torch, which reads the longest length back to the host.
    Compared: SGLang's NGRAM and ArcticInference's suffix trees are host structures, so that a round waits for the
    previous one's tokens on the host.
    Source: prompt lookup decoding; the bucketed chances are `whiflash_sglang.copying.calibration`'s.
    """
    slots, lengths = request_slots.long(), seq_lens.long() + 1
    chance = torch.ones_like(lengths, dtype=torch.float32)
    if behind is not None:
        drafted, drafted_alive = behind
        lengths = lengths + drafted
        limits = torch.where(drafted > 0, limits - drafted, 0)
        chance = drafted_alive.gather(1, (drafted - 1).clamp(min=0)[:, None])[:, 0]
    last = back[slots]
    sources = torch.where(last > 0, lengths - last, 0)
    places = _places(tokens, slots, lengths, sources)
    matched = _matched(tokens, slots, lengths, places)
    matched = torch.where(matched < min_match, 0, matched)
    # Place 0 continues the last copy. A duplicate of it among the others would count its vote twice.
    matched[:, 1:].masked_fill_(places[:, 1:] == places[:, :1], 0)
    best = matched.argmax(1)  # of equal matches the first, since places come newest first
    length, source = (t.gather(1, best[:, None])[:, 0] for t in (matched, places))
    source = torch.where(length > 0, source, 0)

    following = matched > 0
    out = torch.zeros(len(slots), width, dtype=torch.int64, device=tokens.device)
    alive = torch.zeros(len(slots), width, dtype=torch.float32, device=tokens.device)
    agreements = torch.zeros(len(slots), width, dtype=torch.int32, device=tokens.device)
    counts = torch.zeros_like(lengths)
    going = length > 0
    period = (lengths[:, None] - places).clamp(min=1)
    row = torch.arange(len(slots), device=tokens.device)
    for depth in range(width):
        proposed = tokens[slots[:, None], places + depth % period]
        token = proposed.gather(1, best[:, None])[:, 0]
        same = following & (proposed == token[:, None])
        with_it = torch.where(same, matched, 0).amax(1)
        without = torch.where(following & ~same, matched, 0).amax(1)
        agreement = torch.where(without == 0, 1, torch.where(with_it > without, 2, 3))
        agreement = torch.where(following.sum(1) == 1, 0, agreement)
        bucket = (boundaries[None] <= (length + depth)[:, None]).sum(1) - 1
        known = chances[row, bucket.clamp(min=0), agreement]
        chance = chance * (known * factors if depth == 0 else known).clamp(max=SURE)
        going = going & (depth < limits) & (token >= 0)
        if depth > 0 or behind is not None:
            going = going & (chance >= worth)
        out[:, depth] = torch.where(going, token, 0)
        alive[:, depth] = torch.where(going, chance, 0.0)
        agreements[:, depth] = torch.where(going, agreement, 0)
        counts += going
        following = same
    if behind is None:
        back.index_copy_(0, slots, torch.where(length > 0, lengths - source, last))
    return Drafts(out, counts, alive, matched=length, agreements=agreements)


def _places(tokens: Tensor, slots: Tensor, lengths: Tensor, sources: Tensor) -> Tensor:
    """Return places to copy from, [B, 1 + PLACES]: where the last copy goes on, then the newest matches, 0 if fewer."""
    longest = max(int(lengths.max()), 1) if len(lengths) else 1
    place = torch.arange(longest, device=tokens.device)
    text = tokens[slots, :longest]
    end = (lengths - 1).clamp(min=0)[:, None]
    before = torch.nn.functional.pad(text, (1, 0))[:, :longest]  # the token before place s, at s
    one = (place > 0) & (place < lengths[:, None]) & (before == text.gather(1, end))
    earlier = torch.nn.functional.pad(before, (1, 0))[:, :longest]
    two = one & (place > 1) & (earlier == text.gather(1, (end - 1).clamp(min=0)))
    wanted = torch.where(two.any(1, keepdim=True), two, one)
    newest = torch.where(wanted, place, 0)
    newest = torch.nn.functional.pad(newest, (0, PLACES)).topk(PLACES, dim=1).values
    usable = torch.where((sources > 0) & (sources < lengths), sources, 0)
    return torch.cat([usable[:, None], newest], dim=1)


def _matched(tokens: Tensor, slots: Tensor, lengths: Tensor, places: Tensor) -> Tensor:
    """Return the length of each place's match, [B, P]: tokens before it that equal the last tokens of the text."""
    back = torch.arange(1, MOST_MATCHED + 1, device=tokens.device)
    at_place = places[:, :, None] - back
    at_end = (lengths[:, None] - back)[:, None]
    same = (at_place >= 0) & (at_end >= 0)
    here = tokens[slots[:, None, None], at_place.clamp(min=0)]
    same &= here == tokens[slots[:, None, None], at_end.clamp(min=0)]
    return same.cumprod(2).sum(2)

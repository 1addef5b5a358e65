"""Cutting, laying and choosing drafts in plain torch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.structs import Chosen, Drafted, Laid


def cut_drafts(
    confidences: Tensor, calibration: Tensor, edges: Tensor, limits: Tensor, worth: float
) -> tuple[Tensor, Tensor]:
    """See `whiflash_kernels.drafts.cut_drafts`."""
    chances = calibration[torch.bucketize(confidences.contiguous(), edges, right=True)]
    alive = chances.cumprod(1)
    kept = (alive[:, 1:] >= worth).sum(1) + 1
    return torch.minimum(kept, limits), alive


def lay_drafts(
    parts: Sequence[Drafted],
    request_slots: Tensor,
    seq_lens: Tensor,
    width: int,
    confidences: int,
    vocabulary: int,
    text: Tensor | None,
) -> Laid:
    """See `whiflash_kernels.drafts.lay_drafts`."""
    size, device = len(request_slots), request_slots.device
    laid = Laid(
        tokens=torch.zeros((size, width), dtype=torch.int64, device=device),
        counts=torch.zeros(size, dtype=torch.int64, device=device),
        alive=torch.ones((size, width), device=device),
        confidences=torch.zeros((size, confidences), device=device),
        faults=torch.zeros(size, dtype=torch.int32, device=device),
    )
    for part in parts:
        index = part.members
        _lay(laid.tokens, index, part.tokens)
        laid.counts.index_copy_(0, index, part.counts)
        if part.alive is not None:
            _lay(laid.alive, index, part.alive)
        if part.confidences is not None:
            _lay(laid.confidences, index, part.confidences)
    if parts:
        laid = _sound(laid, vocabulary)
    if text is not None:
        for part in parts:
            put_block(text, request_slots[part.members], seq_lens[part.members], laid.tokens[part.members])
    return laid


def _sound(laid: Laid, vocabulary: int) -> Laid:
    """Without what cannot be a draft."""
    tokens = laid.tokens.clamp(0, vocabulary - 1)
    # NaN is what does not equal itself.
    sound = (tokens == laid.tokens) & (laid.alive == laid.alive)
    told = min(laid.confidences.shape[1], tokens.shape[1])
    sure = laid.confidences[:, :told]
    sound[:, :told] &= sure == sure
    counts = torch.minimum(laid.counts.clamp(min=0), sound.cumprod(1).sum(1))
    return laid._replace(tokens=tokens, counts=counts, faults=(counts != laid.counts).to(torch.int32))


def _lay(into: Tensor, index: Tensor, values: Tensor) -> None:
    width = min(values.shape[1], into.shape[1])
    into[:, :width].index_copy_(0, index, values[:, :width])


def put_block(text: Tensor, request_slots: Tensor, seq_lens: Tensor, tokens: Tensor) -> None:
    """Write tokens [B, W] behind the lengths [B]."""
    column = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    text[request_slots[:, None], seq_lens[:, None] + column] = tokens


def join_drafts(
    laid: Laid,
    behind: Drafted,
    request_slots: Tensor,
    seq_lens: Tensor,
    after: Tensor | None,
    text: Tensor | None,
) -> Laid:
    """See `whiflash_kernels.drafts.join_drafts`."""
    kept = laid.counts if after is None else after
    tokens, counts, alive = _joined(laid.tokens, kept, laid.alive, behind)
    if text is not None:
        put_block(text, request_slots, seq_lens, tokens)
    return laid._replace(tokens=tokens, counts=counts, alive=alive)


def choose_drafts(
    laid: Laid,
    request_slots: Tensor,
    seq_lens: Tensor,
    text: Tensor,
    own: Tensor | None,
    behind: Drafted | None,
    late: Drafted | None,
    must_beat: Tensor | None,
    worth: float,
    room: int | None,
) -> Chosen:
    """See `whiflash_kernels.drafts.choose_drafts`."""
    tokens, counts, alive = laid.tokens, laid.counts, laid.alive
    if behind is not None:
        tokens, counts, alive = _joined(tokens, counts, alive, behind)
    taken = None
    if late is not None and must_beat is not None and late.alive is not None:
        taken = _beats(late.counts, late.alive, must_beat, worth)
        width = tokens.shape[1]
        theirs, lives = (
            F.pad(t, (0, max(width - t.shape[1], 0)))[:, :width] for t in (late.tokens, late.alive)
        )
        tokens = torch.where(taken[:, None], theirs, tokens)
        alive = torch.where(taken[:, None], lives, alive)
        counts = torch.where(taken, late.counts, counts)
    wanted = kept = counts.to(torch.int32)
    if room is not None:
        kept = _likeliest(alive, kept, room)
    put_block(text, request_slots, seq_lens, tokens)
    return Chosen(
        tokens=tokens,
        widths=kept + 1,
        own=torch.minimum(kept, laid.counts if own is None else own).to(torch.int32),
        late=torch.zeros_like(kept) if taken is None else taken.to(torch.int32),
        wanted=wanted,
    )


def _joined(tokens: Tensor, counts: Tensor, alive: Tensor, behind: Drafted) -> tuple[Tensor, Tensor, Tensor]:
    """`behind` behind the drafts of every request: it overwrites padding only."""
    width, extra = tokens.shape[1], behind.tokens.shape[1]
    column = counts[:, None] + torch.arange(extra, device=counts.device)
    tokens = F.pad(tokens, (0, extra)).scatter_(1, column, behind.tokens)[:, :width]
    theirs = torch.zeros_like(behind.tokens, dtype=alive.dtype) if behind.alive is None else behind.alive
    alive = F.pad(alive, (0, extra)).scatter_(1, column, theirs)[:, :width]
    return tokens, counts + behind.counts, alive


def _beats(counts: Tensor, alive: Tensor, must_beat: Tensor, worth: float) -> Tensor:
    """[B] bool: whose late drafts bring more."""
    column = torch.arange(alive.shape[1], device=must_beat.device)
    gain = torch.where(column < counts[:, None], alive - worth, 0.0).sum(1)
    return (counts > 0) & (gain > must_beat)


def _likeliest(alive: Tensor, counts: Tensor, room: int) -> Tensor:
    """[B]: how many drafts of each request are among the `room` likeliest of the batch."""
    size, width = alive.shape
    if size * width <= room:
        return counts
    column = torch.arange(width, device=counts.device)
    real = torch.where(column < counts[:, None], alive, -1.0)
    # Depth by depth, so that of equals the earlier one stays.
    order = real.T.reshape(-1).argsort(descending=True, stable=True)[:room]
    kept = torch.zeros(width * size, dtype=torch.int32, device=order.device).index_fill_(0, order, 1)
    return torch.minimum(kept.view(width, size).sum(0, dtype=torch.int32), counts)

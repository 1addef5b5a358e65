"""Inputs and rows of draft passes in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from whiflash_kernels.structs import BacklogRings, DraftInputs, PassRows


def draft_inputs(
    rings: BacklogRings,
    members: Tensor | None,
    request_slots: Tensor,
    seq_lens: Tensor,
    bonus: Tensor,
    limits: Tensor,
    chunks: Sequence[int] | None,
    chunk_width: int,
) -> DraftInputs:
    """See `whiflash_kernels.passes.draft_inputs`."""
    batch = (request_slots, seq_lens, bonus, limits)
    slots, lengths, token, most = (t.long() if members is None else t[members].long() for t in batch)
    features = rings.features
    if chunks is not None and not chunks:
        tail = features.new_empty(len(slots), 0)
    else:
        place = (lengths - 1) % rings.capacity
        if chunks is None:
            tail = features[slots, place]
        else:
            picked = torch.tensor(chunks, device=slots.device)
            grid = features.view(*features.shape[:2], -1, chunk_width)
            tail = grid[slots[:, None], place[:, None], picked].flatten(1)
    return DraftInputs(slots, lengths, token, most, tail)


def pass_rows(
    req_to_token: Tensor,
    request_slots: Tensor,
    seq_lens: Tensor,
    bonus: Tensor,
    offset: int,
    width: int,
    fill: int | None,
) -> PassRows:
    """See `whiflash_kernels.passes.pass_rows`."""
    positions = seq_lens[:, None] + torch.arange(offset, offset + width, device=seq_lens.device)
    slots = req_to_token[request_slots[:, None], positions.clamp(min=0)]
    slots = slots.to(torch.int64).masked_fill_(positions < 0, 0)
    ids = None
    if fill is not None:
        ids = torch.full_like(positions, fill)
        ids[:, 0] = bonus
    return PassRows(positions, slots, ids)

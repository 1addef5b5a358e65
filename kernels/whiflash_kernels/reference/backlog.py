"""Parking and unparking in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from whiflash_kernels.structs import PAD_ROW, BacklogRings, Unparked


def park(
    rings: BacklogRings,
    features: Tensor,
    next_tokens: Tensor,
    request_slots: Tensor,
    begins: Tensor,
    lengths: Tensor,
    row_starts: Tensor,
    max_length: int,
) -> None:
    """See `whiflash_kernels.backlog.park`; `max_length` sizes a grid, and there is none here."""
    if all(length == 1 for length in lengths.tolist()):
        # What a round without drafts leaves; see reference/block.py.
        source, ring_rows = row_starts, request_slots.long() * rings.capacity + begins % rings.capacity
    else:
        source, ring_rows = _ragged(rings.capacity, request_slots, begins, lengths, row_starts)
    rings.features.flatten(0, 1).index_copy_(0, ring_rows, features.index_select(0, source))
    rings.next_tokens.view(-1).index_copy_(0, ring_rows, next_tokens.index_select(0, source))


def _ragged(
    capacity: int, request_slots: Tensor, begins: Tensor, lengths: Tensor, row_starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Source row and ring row of everything that is parked."""
    kept = lengths.clamp_max(capacity).long()
    owner = torch.repeat_interleave(kept)
    # Index inside the request's run of rows; a run longer than the ring keeps its last `capacity` rows.
    inside = (
        torch.arange(owner.numel(), device=owner.device) - (kept.cumsum(0) - kept - lengths + kept)[owner]
    )
    ring_rows = request_slots[owner].long() * capacity + (begins[owner] + inside) % capacity
    return row_starts[owner] + inside, ring_rows


def unpark(
    rings: BacklogRings,
    request_slots: Tensor,
    begins: Tensor,
    ends: Tensor,
    req_to_token: Tensor,
    rows: int | None,
    chunks: Sequence[int] | None,
    chunk_width: int,
) -> Unparked:
    """See `whiflash_kernels.backlog.unpark`."""
    lengths = (ends - begins).clamp_min(0).long()
    owner = torch.repeat_interleave(lengths)
    inside = torch.arange(owner.numel(), device=owner.device) - (lengths.cumsum(0) - lengths)[owner]
    positions = begins[owner] + inside
    slots = request_slots[owner].long()
    ring_rows = slots * rings.capacity + positions % rings.capacity
    table = rings.features.flatten(0, 1)
    if chunks is None:
        features = table[ring_rows]
    else:
        picked = torch.tensor(chunks, device=owner.device)
        features = table.view(table.shape[0], -1, chunk_width)[ring_rows[:, None], picked].flatten(1)
    packed = Unparked(
        features=features,
        next_tokens=rings.next_tokens.view(-1)[ring_rows],
        positions=positions,
        cache_slots=req_to_token[slots, positions].long(),
        request_of_row=owner,
        total=torch.tensor(owner.numel(), device=owner.device),
    )
    return packed if rows is None else _pad(packed, rows)


def _pad(packed: Unparked, rows: int) -> Unparked:
    missing = rows - packed.positions.numel()
    if missing < 0:
        raise ValueError(
            f"the backlog holds {packed.positions.numel()} rows, more than rows={rows}: raise rows"
        )

    def extend(tensor: Tensor, value: int) -> Tensor:
        return torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), value)])

    return Unparked(
        features=extend(packed.features, 0),
        next_tokens=extend(packed.next_tokens, 0),
        positions=extend(packed.positions, 0),
        cache_slots=extend(packed.cache_slots, PAD_ROW),
        request_of_row=extend(packed.request_of_row, PAD_ROW),
        total=packed.total,
    )


def claim_backlogs(
    watermarks: Tensor, request_slots: Tensor, seq_lens: Tensor, due: Tensor
) -> tuple[Tensor, Tensor]:
    """See `whiflash_kernels.backlog.claim_backlogs`."""
    slots = request_slots.long()
    begins = watermarks[:, slots]
    # No watermark is below 0, so what is not due stays.
    ends = torch.maximum(begins, seq_lens * due)
    watermarks.index_copy_(1, slots, ends)
    return begins, ends

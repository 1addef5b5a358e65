"""Ops that gather a drafter pass's inputs and compute its rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from whiflash_kernels.backlog import check_chunks
from whiflash_kernels.dispatch import op
from whiflash_kernels.structs import BacklogRings, PassInputs


def _check_inputs(
    rings: BacklogRings,
    members: Tensor | None,
    request_slots: Tensor,
    *_: Any,
    chunks: Sequence[int] | None = None,
    chunk_width: int = 0,
    into: PassInputs | None = None,
    **__: Any,
) -> None:
    check_chunks(rings, chunks=chunks, chunk_width=chunk_width)
    count = len(request_slots if members is None else members)
    if into is not None and count > len(into.bonus):
        raise ValueError(f"{count} requests exceed the {len(into.bonus)} that a pass reads")


@op(_check_inputs)
def draft_inputs(
    rings: BacklogRings,
    members: Tensor | None,
    request_slots: Tensor,
    seq_lens: Tensor,
    bonus: Tensor,
    limits: Tensor,
    calibration: Tensor,
    *,
    chunks: Sequence[int] | None = None,
    chunk_width: int = 0,
    into: PassInputs | None = None,
    padding: int = 0,
) -> PassInputs:
    """Gather from a batch the requests that one drafter drafts for, each with the feature that a chain starts from.

    Member m gets the slot s, length, bonus token and limit of request b = members[m], and tail[m] = rings.features[s,
    (seq_lens[b] - 1) % capacity], of which only the columns of ``chunks``. With ``into`` they are written to the first
    M of its S requests (S at least 1), with ``calibration``. Each further one has request slot 0, ``padding`` tokens,
    bonus token and limit 0, and keeps its tail.

    Args:
        rings: read only.
        members: [M] int64 or int32, indices of the batch; None: all, in order.
        request_slots, seq_lens, bonus, limits: [B] int64 or int32 each; lengths are at least 1.
        calibration: [C] float32, of the pass.
        chunks: which column groups of the feature to take, in this order, as for `unpark`; None takes all columns, an
            empty sequence none.
        chunk_width: columns of one group; needed with ``chunks``.
        into: contiguous, written in place: what a captured pass reads.
        padding: length of a padding request.

    Returns:
        `PassInputs` of M requests: the first of ``into``, or new and contiguous. Without ``into`` the calibration is
        the argument itself, and so may the numbers per request be if ``members`` is None.

    Raises:
        ValueError: a chunk is outside the features, or there are more members than ``into`` holds.

    Grid: (M or S, columns / block), one launch (none where nothing is to be copied), graph-capturable.
    Numerics: a copy.
    Fallback: torch (one gather for each).
    Source: batched gathers; the chain's start is EAGLE-3's, arXiv 2503.01840.
    """
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
    found = PassInputs(slots, lengths, token, most, tail, calibration)
    if into is None:
        return found
    count = len(slots)
    for target, values in zip(into[:-1], found[:-1], strict=True):
        target[:count] = values
    for target, none in zip(into[:4], (0, padding, 0, 0), strict=True):
        target[count:] = none
    into.calibration.copy_(calibration)
    return PassInputs._make([*(target[:count] for target in into[:-1]), into.calibration])


def _check_width(*_: Any, width: int, **__: Any) -> None:
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")


@op(_check_width)
def pass_rows(
    req_to_token: Tensor,
    request_slots: Tensor,
    seq_lens: Tensor,
    bonus: Tensor,
    *,
    offset: int,
    width: int,
    fill: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return positions, KV slots and token ids of a draft pass with ``width`` rows per request.

    Row i of request g is at p = seq_lens[g] + offset + i; its KV goes to req_to_token[request_slots[g], p]. A padding
    request of a captured pass has p < 0: its row is at 0, and its KV goes to slot 0. Ids are bonus[g] for i = 0 and
    ``fill`` after it.

    Args:
        req_to_token: [slots, context] int32 (or int64), last dimension contiguous.
        request_slots, bonus: [G] int64 or int32. seq_lens: [G] int64.
        offset: of the first row. width: rows of every request.
        fill: id after the bonus token, a block's mask token; None: no ids, as a chain has them step by step.

    Returns:
        positions, KV slots and ids, [G, W] int64 each; no ids without ``fill``.

    Raises:
        ValueError: ``width`` is below 1.

    Grid: (G), one launch, graph-capturable.
    Numerics: integers.
    Fallback: torch.
    Source: DFlash's block layout, arXiv 2602.06036; EAGLE-3's chain, arXiv 2503.01840.
    """
    positions = seq_lens[:, None] + torch.arange(offset, offset + width, device=seq_lens.device)
    padding = positions < 0
    positions.clamp_(min=0)
    slots = req_to_token[request_slots[:, None], positions].to(torch.int64).masked_fill_(padding, 0)
    ids = None
    if fill is not None:
        ids = torch.full_like(positions, fill)
        ids[:, 0] = bonus
    return positions, slots, ids

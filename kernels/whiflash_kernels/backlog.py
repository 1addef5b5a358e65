"""Ops on the per-request rings of features: park committed ones, claim ragged backlogs, pack those into a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from whiflash_kernels.dispatch import op
from whiflash_kernels.structs import PAD_ROW, BacklogRings, Claims


def _check_features(rings: BacklogRings, features: Tensor, *_: Any, **__: Any) -> None:
    if features.ndim != 2 or features.shape[1] != rings.features.shape[2] or features.dtype != rings.features.dtype:
        raise ValueError(
            f"features must be [T, {rings.features.shape[2]}] {rings.features.dtype} to fit the rings, "
            f"got {tuple(features.shape)} {features.dtype}"
        )


@op(_check_features)
def park(
    rings: BacklogRings,
    features: Tensor,
    next_tokens: Tensor,
    request_slots: Tensor,
    begins: Tensor,
    lengths: Tensor,
    row_starts: Tensor,
    *,
    max_length: int | None = None,
) -> None:
    """Scatter the committed rows of a forward into the backlog rings.

    For request b and i < lengths[b], with s = request_slots[b] and p = begins[b] + i:
    rings.features[s, p % capacity] = features[row_starts[b] + i], and the same for next_tokens.
    Rows of a request beyond ``lengths[b]`` (rejected drafts) are not read. A run longer than the ring keeps
    its last ``capacity`` rows. After a verification the arguments are at hand: ``begins`` is the old
    ``seq_lens``, ``lengths`` is ``accept_lens``, ``row_starts`` is ``qo_indptr[:-1]`` and ``next_tokens`` is
    the target's prediction at each row: the token after a committed row is what the target predicted there.

    Args:
        rings: written in place.
        features: [T, width] in the rings' dtype, last dimension contiguous (rows may be strided).
        next_tokens: [T] int64, the token at the row's position + 1.
        request_slots: [B] int64 or int32, pairwise different.
        begins: [B] int64 or int32, first position of each request.
        lengths: [B] int64 or int32, rows to park; 0 skips the request.
        row_starts: [B] int64 or int32, first row of each request in ``features``.
        max_length: upper bound on ``lengths``, which sizes the grid; None takes T. Longer runs are a caller's
            error and lose their tail on a GPU; the torch path does not need the bound.

    Raises:
        ValueError: ``features`` does not fit the rings.

    Grid: (B * max_length, width / block); graph-capturable, no host synchronisation.
    Numerics: a copy.
    Fallback: torch (row indices, then one ``index_copy_`` for each ring).
    Compared: torch needs the ragged row indices materialised first (six small launches); SGLang
    parks nothing and appends to the draft's KV in every round.
    Source: Lazy Catch-up, WhiFlash, arXiv 2606.07710.
    """
    if all(length == 1 for length in lengths.tolist()):
        # A round without drafts parks one row per request: the fast path, as in block.py.
        source, ring_rows = row_starts, request_slots.long() * rings.capacity + begins % rings.capacity
    else:
        source, ring_rows = _ragged(rings.capacity, request_slots, begins, lengths, row_starts)
    rings.features.flatten(0, 1).index_copy_(0, ring_rows, features.index_select(0, source))
    rings.next_tokens.view(-1).index_copy_(0, ring_rows, next_tokens.index_select(0, source))


def check_chunks(
    rings: BacklogRings, *_: Any, chunks: Sequence[int] | None = None, chunk_width: int = 0, **__: Any
) -> None:
    """Raise ValueError if a column group of ``chunks`` is outside the features."""
    width = rings.features.shape[2]
    if chunks and not (
        chunk_width > 0 and width % chunk_width == 0 and all(0 <= c < width // chunk_width for c in chunks)
    ):
        raise ValueError(f"chunks {tuple(chunks)} of {chunk_width} columns do not fit features of width {width}")


@op(check_chunks)
def unpark(
    rings: BacklogRings,
    request_slots: Tensor,
    begins: Tensor,
    ends: Tensor,
    req_to_token: Tensor,
    *,
    rows: int,
    chunks: Sequence[int] | None = None,
    chunk_width: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gather ragged backlogs into one packed batch with positions and KV slots.

    Request b contributes positions begins[b] .. ends[b] - 1 in order; for position p of slot s:
    feature = rings.features[s, p % capacity], cache slot = req_to_token[s, p]. Slots are resolved here, at
    flush time, because the radix tree may remap them while a backlog waits.

    Args:
        rings: read only.
        request_slots: [B] int64 or int32.
        begins: [B] int64 or int32, the chosen drafter's watermark.
        ends: [B] int64 or int32; ``ends - begins`` is at most the rings' capacity; at or below 0 is empty.
        req_to_token: [slots, context] int32 (or int64), last dimension contiguous.
        rows: of the output, at least the sum of the lengths; further rows are padding.
        chunks: which column groups of the features to take, in this order: a drafter's layers among the captured union.
            None takes all columns.
        chunk_width: columns of one group; needed with ``chunks``.

    Returns:
        Packed by request, in the order of their positions: features [N, columns], and next tokens, positions, KV slots
        and the request of each row, an index of the batch, [N] int64. Padding rows: features, next tokens, positions 0;
        slots (which catch-up skips) and requests -1.

    Raises:
        ValueError: a chunk is outside the features, or (torch) the backlogs exceed ``rows``; on a GPU what
            exceeds is left out.

    Grid: (rows, columns / block), each program finds its request by counting cumulative lengths in registers.
    Numerics: a copy.
    Fallback: torch (``repeat_interleave`` and gathers).
    Compared: torch gathers need the ragged indices materialised and a host synchronisation; FlashInfer's
    ``append_paged_kv_cache`` goes the other way, from packed to paged.
    Source: Lazy Catch-up, WhiFlash, arXiv 2606.07710.
    """
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
    tokens, cache_slots = rings.next_tokens.view(-1)[ring_rows], req_to_token[slots, positions].long()
    missing = rows - positions.numel()
    if missing < 0:
        raise ValueError(f"the backlog holds {positions.numel()} rows, more than rows={rows}: raise rows")

    def padded(tensor: Tensor, value: int = 0) -> Tensor:
        return torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), value)])

    return (padded(features), padded(tokens), padded(positions), padded(cache_slots, PAD_ROW), padded(owner, PAD_ROW))


def _check_claim(
    watermarks: Tensor, request_slots: Tensor, _: Tensor, due: Tensor, *, into: Claims | None = None
) -> None:
    if due.shape != (watermarks.shape[0], request_slots.shape[0]):
        raise ValueError(f"due must be {(watermarks.shape[0], request_slots.shape[0])}, got {tuple(due.shape)}")
    if not watermarks.is_contiguous():
        raise ValueError("watermarks must be contiguous")
    if into is not None and len(request_slots) > len(into.request_slots):
        raise ValueError(f"{len(request_slots)} requests exceed the {len(into.request_slots)} of a pass")


@op(_check_claim)
def claim_backlogs(
    watermarks: Tensor, request_slots: Tensor, seq_lens: Tensor, due: Tensor, *, into: Claims | None = None
) -> Claims:
    """Return the tokens that each drafter must ingest now, and advance its watermarks past them.

    With w = watermarks[a, request_slots[b]]: begins[a, b] = w, and ends[a, b] = max(w, seq_lens[b]) if due[a, b] is not
    0, else w, so that there is nothing between. watermarks[a, request_slots[b]] = ends[a, b]. With ``into`` the result
    is written to the first B of its S requests; each further one has request slot 0, begin 0 and end 0.

    Args:
        watermarks: [A, slots] int64, contiguous, up to where each drafter's KV is valid; written in place.
        request_slots: [B] int64 or int32, pairwise different.
        seq_lens: [B] int64 or int32.
        due: [A, B] int64 or int32, 0 or 1.
        into: contiguous, written in place: what captured catch-ups read.

    Returns:
        `Claims` of B requests: the first of ``into``, or new; then its slots may be the argument itself.

    Raises:
        ValueError: ``due`` is not [A, B], ``watermarks`` is not contiguous, or there are more requests than ``into``
            holds.

    Grid: (A * B / 128, or A * S / 128), one launch for all drafters, graph-capturable.
    Numerics: integers.
    Fallback: torch.
    Source: Lazy Catch-up, WhiFlash, arXiv 2606.07710.
    """
    slots = request_slots.long()
    begins = watermarks[:, slots]
    # Watermarks are at least 0, so a product of 0 leaves those that are not due unchanged.
    ends = torch.maximum(begins, seq_lens * due)
    watermarks.index_copy_(1, slots, ends)
    found = Claims(slots, begins, ends)
    if into is None:
        return found
    for target, values in zip(into, found, strict=True):
        target[..., : len(slots)], target[..., len(slots) :] = values, 0
    return Claims(*(target[..., : len(slots)] for target in into))


def _ragged(
    capacity: int, request_slots: Tensor, begins: Tensor, lengths: Tensor, row_starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the source row and the ring row of every row that is parked, [N] int64 each."""
    kept = lengths.clamp_max(capacity).long()
    owner = torch.repeat_interleave(kept)
    # Index inside the request's run of rows; a run longer than the ring keeps its last `capacity` rows.
    inside = torch.arange(owner.numel(), device=owner.device) - (kept.cumsum(0) - kept - lengths + kept)[owner]
    ring_rows = request_slots[owner].long() * capacity + (begins[owner] + inside) % capacity
    return row_starts[owner] + inside, ring_rows

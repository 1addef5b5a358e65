"""Ops that pack and commit a verification whose requests have different drafters and widths."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.dispatch import op
from whiflash_kernels.drafts import put_block
from whiflash_kernels.structs import PAD_ROW, Committed, GraphSlots, MixedBlock


def _check_drafts(bonus: Tensor, drafts: Tensor, *_: Any, **__: Any) -> None:
    if drafts.ndim != 2 or drafts.shape[0] != bonus.shape[0]:
        raise ValueError(f"drafts must be [{bonus.shape[0]}, D] to match bonus, got {tuple(drafts.shape)}")


@op(_check_drafts)
def prepare_mixed_block(
    bonus: Tensor,
    drafts: Tensor,
    widths: Tensor,
    seq_lens: Tensor,
    request_slots: Tensor,
    req_to_token: Tensor,
    *,
    rows: int | None = None,
) -> MixedBlock:
    """Pack a verification's token ids, positions and KV slots, request after request.

    Request b owns rows qo_indptr[b] : qo_indptr[b] + widths[b]; its row i holds token
    (bonus[b] if i == 0 else drafts[b, i - 1]) at position seq_lens[b] + i and slot
    req_to_token[request_slots[b], position].

    Args:
        bonus: [B] int64, the last committed token of each request.
        drafts: [B, D] int64, each request's drafts from column 0; columns past ``widths[b] - 1`` are not
            read. D may be 0.
        widths: [B] int64 or int32 in 0..D + 1: 1 verifies the bonus token alone, 0 gives no rows.
        seq_lens: [B] int64 or int32, committed tokens that have KV.
        request_slots: [B] int64 or int32.
        req_to_token: [slots, context] int32 (or int64), last dimension contiguous.
        rows: None packs exactly sum(widths) rows, which on a GPU reads that sum back to the host; a number
            fixes the rows, pads, and is graph-capturable. Padding rows have KV slot 0, which SGLang reserves for
            writes nobody reads.

    Returns:
        `MixedBlock`.

    Raises:
        ValueError: ``drafts`` does not belong to the batch, or (torch) the widths exceed ``rows``; on a GPU
            what exceeds is left out.

    Grid: (rows / block), one launch; each program counts cumulative widths in registers.
    Numerics: integers.
    Fallback: torch.
    Compared: SGLang's ``prepare_dflash_draft_block`` has one width for the batch; FlashInfer's ragged helpers
    need ``qo_indptr`` beforehand and give no ids.
    """
    # A round without drafts has one row per request and is the shortest, so saving small operators shows most here.
    if not drafts.shape[1] and all(width == 1 for width in widths.tolist()):
        return _padded(rows, *_one_row_each(bonus, seq_lens, request_slots, req_to_token))
    widths = widths.long()
    ends = widths.cumsum(0)
    indptr = torch.zeros(widths.numel() + 1, dtype=torch.int32, device=widths.device)
    indptr[1:] = ends
    owner = torch.repeat_interleave(widths)
    offset = torch.arange(owner.numel(), device=owner.device) - (ends - widths)[owner]
    positions = seq_lens[owner].long() + offset
    tokens = torch.cat([bonus[:, None], drafts], dim=1)
    slots = req_to_token[request_slots[owner], positions].long()
    return _padded(rows, tokens[owner, offset], positions, slots, owner, indptr)


def _check_slots(widths: Tensor, _: Tensor, __: Tensor, slots: GraphSlots, **___: Any) -> None:
    if len(widths) > len(slots.widths):
        raise ValueError(f"{len(widths)} requests exceed the {len(slots.widths)} slots of a graph")


@op(_check_slots)
def fill_slots(
    widths: Tensor, seq_lens: Tensor, request_slots: Tensor, slots: GraphSlots, *, rows: int, empty: int
) -> None:
    """Write a batch into the slots that a verification's graph reads, and share its padding rows among the other slots.

    Slot b < B is request b. With R = S - B and left = rows - sum(widths), slot B + i has left // R + (i < left % R)
    rows, ``empty`` tokens and request slot 0. Nothing else reads ``slots`` while it is written.

    Args:
        widths, seq_lens, request_slots: [B] int64 or int32, as in `prepare_mixed_block`; sum(widths) is at most
            ``rows``.
        slots: of S slots, written in place.
        rows: of the graph; if S = B, the sum of ``widths``.
        empty: length that attention reads for a slot without a request.

    Raises:
        ValueError: there are more requests than slots.

    Grid: one program, one launch.
    Numerics: integers.
    Fallback: torch.
    Compared: SGLang takes 12 launches for it (``padded_to_bucket``, its offsets and lengths, copies of them).
    """
    count, spare = len(widths), len(slots.widths) - len(widths)
    slots.widths[:count] = widths
    slots.seq_lens[:count], slots.seq_lens[count:] = seq_lens, empty
    slots.request_slots[:count], slots.request_slots[count:] = request_slots, 0
    if spare:
        left = rows - widths.sum()
        extra = torch.arange(spare, device=widths.device) < left % spare
        slots.widths[count:] = left // spare + extra
    slots.qo_indptr[0] = 0
    slots.qo_indptr[1:] = slots.widths.cumsum(0)
    slots.ends.copy_(slots.seq_lens + slots.widths)


def _check_rows(predictions: Tensor, input_ids: Tensor, *_: Any, stride: int, **__: Any) -> None:
    if predictions.shape != input_ids.shape:
        raise ValueError(
            f"predictions and input_ids must match, got {tuple(predictions.shape)} and {tuple(input_ids.shape)}"
        )
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")


@op(_check_rows)
def accept_and_commit(
    predictions: Tensor,
    input_ids: Tensor,
    qo_indptr: Tensor,
    seq_lens: Tensor,
    *,
    stride: int,
    request_slots: Tensor,
    stops: Tensor,
    text: Tensor,
) -> Committed:
    """Accept each request's longest prefix of correct drafts, up to a stop token, and write its tokens to the text.

    With s = qo_indptr[b] and w = min(qo_indptr[b + 1] - s, stride): accepted = the number of leading i < w - 1 with
    predictions[s + i] == input_ids[s + i + 1]; accept_lens = accepted + 1 (0 when w = 0); tokens[b, :accept_lens] =
    predictions[s : s + accept_lens], whose last is the new bonus token. accept_lens ends after the first i with
    predictions[s + i] in stops[request_slots[b]]. text[request_slots[b], seq_lens[b] + 1 + i] = tokens[b, i] for i <
    stride: tokens past the committed ones are overwritten by later rounds. Lossless for deterministic drafts: greedy
    predictions give greedy decoding's tokens, predictions sampled under each request's own parameters give exactly the
    target's distribution.

    Args:
        predictions: [T] int64, the target's token at each row (argmax or sampled).
        input_ids: [T] int64, the block's ids from `prepare_mixed_block`; T may include padding rows.
        qo_indptr: [B + 1] int32 (or int64).
        seq_lens: [B] int64 or int32.
        stride: columns of ``tokens``; a request commits at most this many, so give the widest width.
        request_slots: [B] int64 or int32, pairwise different.
        stops: [slots, S] int64, contiguous: tokens that end each request, -1 where it has fewer.
        text: [slots, context] int64, last dimension contiguous, with ``stride`` columns beyond the longest length;
            written in place.

    Returns:
        `Committed`.

    Raises:
        ValueError: ``predictions`` and ``input_ids`` differ in length, or ``stride`` is below 1.

    Grid: (B), one launch, graph-capturable.
    Numerics: integers.
    Fallback: torch (cumulative product over a padded view).
    Compared: SGLang's ``_fused_correct_drafts_and_bonus_kernel`` and ``sgl_kernel.verify_tree_greedy`` accept
    for one width or a tree; neither takes ragged rows, ends at stops, or keeps the text.
    Source: speculative sampling, arXiv 2211.17192, for a point-mass draft distribution.
    """
    if stride == 1 and qo_indptr.tolist() == list(range(qo_indptr.shape[0])):
        # With one row per request a stop changes nothing: only one token is committed.
        bonus = predictions[: seq_lens.shape[0]].clone()
        accept_lens, tokens, last = torch.ones_like(bonus, dtype=torch.int32), bonus[:, None].clone(), None
    elif predictions.numel() == 0 or seq_lens.numel() == 0:
        accept_lens = torch.zeros_like(seq_lens, dtype=torch.int32)
        tokens = predictions.new_zeros((seq_lens.numel(), stride))
        bonus, last = predictions.new_zeros((seq_lens.numel(),)), None
    else:
        ends = stops[request_slots]
        accept_lens, tokens, bonus, last = _accepted(predictions, input_ids, qo_indptr, ends, stride)
    put_block(text, request_slots, seq_lens, tokens)
    return Committed(
        accept_lens=accept_lens,
        tokens=tokens,
        bonus=bonus,
        seq_lens=seq_lens + accept_lens.to(seq_lens.dtype),
        last_rows=qo_indptr[:-1].long() if last is None else last,
    )


def _one_row_each(bonus: Tensor, seq_lens: Tensor, request_slots: Tensor, req_to_token: Tensor) -> tuple[Tensor, ...]:
    """Return ids, positions, KV slots, request of each row, and `qo_indptr`, for one row per request."""
    indptr = torch.arange(bonus.shape[0] + 1, dtype=torch.int32, device=bonus.device)
    slots = req_to_token[request_slots, seq_lens].long()
    return bonus, seq_lens.to(torch.int64, copy=True), slots, indptr[:-1].long(), indptr


def _padded(
    rows: int | None, ids: Tensor, positions: Tensor, slots: Tensor, owner: Tensor, indptr: Tensor
) -> MixedBlock:
    missing = 0 if rows is None else rows - positions.numel()
    if missing < 0:
        raise ValueError(f"the widths sum to {positions.numel()} rows, more than rows={rows}: raise rows")
    if missing:
        columns = zip((ids, positions, slots, owner), (0, 0, 0, PAD_ROW), strict=True)
        ids, positions, slots, owner = (F.pad(column, (0, missing), value=value) for column, value in columns)
    both = torch.stack([ids, owner])
    return MixedBlock(both[0], positions, slots, both[1], indptr, both)


def _accepted(
    predictions: Tensor, input_ids: Tensor, qo_indptr: Tensor, stops: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `accept_lens`, `tokens`, `bonus` and `last_rows` of `Committed`. stops: [B, S]."""
    starts, widths = qo_indptr[:-1].long(), qo_indptr.diff().clamp_max_(stride)
    column = torch.arange(stride, device=widths.device)
    # Rows past a request's width are read (clamped into the tensor) and then masked away.
    row = (starts[:, None] + column).clamp_max_(predictions.numel() - 1)
    predicted = predictions[row]
    drafted = input_ids[(row + 1).clamp_max_(predictions.numel() - 1)]
    goes_on = (predicted == drafted) & (column < widths[:, None] - 1)
    goes_on &= (predicted[:, :, None] != stops[:, None, :]).all(2)
    accept_lens = goes_on.cumprod(dim=1).sum(dim=1, dtype=torch.int32).add_(1).minimum(widths)
    index = (accept_lens - 1).clamp_min_(0).long()
    bonus = predicted.gather(1, index[:, None]).squeeze(1).masked_fill_(accept_lens == 0, 0)
    tokens = predicted.masked_fill_(column >= accept_lens[:, None], 0)
    return accept_lens.to(torch.int32), tokens, bonus, starts + index

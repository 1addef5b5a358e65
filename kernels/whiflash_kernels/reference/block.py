"""Building and committing mixed-width blocks in plain torch.

A round without drafts has one row a request, known beforehand. It is the round in which a few microseconds of small
operators show most, so it has a way of its own.
"""

import torch
from torch import Tensor

from whiflash_kernels.structs import PAD_ROW, Committed, MixedBlock


def prepare_mixed_block(
    bonus: Tensor,
    drafts: Tensor,
    widths: Tensor,
    seq_lens: Tensor,
    request_slots: Tensor,
    req_to_token: Tensor,
    rows: int | None,
    pad_slot: int,
) -> MixedBlock:
    """See `whiflash_kernels.block.prepare_mixed_block`."""
    if not drafts.shape[1] and all(width == 1 for width in widths.tolist()):
        return _pad(_one_row_each(bonus, seq_lens, request_slots, req_to_token), rows, pad_slot)
    widths = widths.long()
    ends = widths.cumsum(0)
    indptr = torch.zeros(widths.numel() + 1, dtype=torch.int32, device=widths.device)
    indptr[1:] = ends
    owner = torch.repeat_interleave(widths)
    offset = torch.arange(owner.numel(), device=owner.device) - (ends - widths)[owner]
    positions = seq_lens[owner].long() + offset
    tokens = torch.cat([bonus[:, None], drafts], dim=1)
    block = MixedBlock(
        input_ids=tokens[owner, offset],
        positions=positions,
        cache_slots=req_to_token[request_slots[owner], positions].long(),
        request_of_row=owner,
        qo_indptr=indptr,
    )
    return _pad(block, rows, pad_slot)


def _one_row_each(bonus: Tensor, seq_lens: Tensor, request_slots: Tensor, req_to_token: Tensor) -> MixedBlock:
    indptr = torch.arange(bonus.shape[0] + 1, dtype=torch.int32, device=bonus.device)
    return MixedBlock(
        input_ids=bonus.clone(),
        positions=seq_lens.to(torch.int64, copy=True),
        cache_slots=req_to_token[request_slots, seq_lens].long(),
        request_of_row=indptr[:-1].long(),
        qo_indptr=indptr,
    )


def _pad(block: MixedBlock, rows: int | None, pad_slot: int) -> MixedBlock:
    missing = 0 if rows is None else rows - block.positions.numel()
    if missing < 0:
        raise ValueError(
            f"the widths sum to {block.positions.numel()} rows, more than rows={rows}: raise rows"
        )
    if not missing:
        return block

    def extend(tensor: Tensor, value: int) -> Tensor:
        return torch.cat([tensor, tensor.new_full((missing,), value)])

    return MixedBlock(
        input_ids=extend(block.input_ids, 0),
        positions=extend(block.positions, 0),
        cache_slots=extend(block.cache_slots, pad_slot),
        request_of_row=extend(block.request_of_row, PAD_ROW),
        qo_indptr=block.qo_indptr,
    )


def accept_and_commit(
    predictions: Tensor,
    input_ids: Tensor,
    qo_indptr: Tensor,
    seq_lens: Tensor,
    stride: int,
    pad_token: int,
    request_slots: Tensor | None,
    stops: Tensor | None,
    text: Tensor | None,
) -> Committed:
    """See `whiflash_kernels.block.accept_and_commit`."""
    if stride == 1 and qo_indptr.tolist() == list(range(qo_indptr.shape[0])):
        # A request ends behind its only token whether that is a stop or not.
        bonus = predictions[: seq_lens.shape[0]].clone()
        accept_lens, tokens, last = torch.ones_like(bonus, dtype=torch.int32), bonus[:, None].clone(), None
    elif predictions.numel() == 0 or seq_lens.numel() == 0:
        accept_lens = torch.zeros_like(seq_lens, dtype=torch.int32)
        tokens = predictions.new_full((seq_lens.numel(), stride), pad_token)
        bonus, last = predictions.new_full((seq_lens.numel(),), pad_token), None
    else:
        ends = None if stops is None or request_slots is None else stops[request_slots]
        accept_lens, tokens, bonus, last = _accepted(
            predictions, input_ids, qo_indptr, ends, stride, pad_token
        )
    if text is not None and request_slots is not None:
        column = torch.arange(1, stride + 1, device=tokens.device)
        text[request_slots[:, None], seq_lens[:, None] + column] = tokens
    return Committed(
        accept_lens=accept_lens,
        tokens=tokens,
        bonus=bonus,
        seq_lens=seq_lens + accept_lens.to(seq_lens.dtype),
        last_rows=qo_indptr[:-1].long() if last is None else last,
    )


def _accepted(
    predictions: Tensor,
    input_ids: Tensor,
    qo_indptr: Tensor,
    stops: Tensor | None,
    stride: int,
    pad_token: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`accept_lens`, `tokens`, `bonus` and `last_rows`. stops: [B, S]."""
    starts, widths = qo_indptr[:-1].long(), qo_indptr.diff().clamp_max_(stride)
    column = torch.arange(stride, device=widths.device)
    # Rows past a request's width are read (clamped into the tensor) and then masked away.
    row = (starts[:, None] + column).clamp_max_(predictions.numel() - 1)
    predicted = predictions[row]
    drafted = input_ids[(row + 1).clamp_max_(predictions.numel() - 1)]
    goes_on = (predicted == drafted) & (column < widths[:, None] - 1)
    if stops is not None:
        goes_on &= (predicted[:, :, None] != stops[:, None, :]).all(2)
    accept_lens = goes_on.cumprod(dim=1).sum(dim=1, dtype=torch.int32).add_(1).minimum(widths)
    index = (accept_lens - 1).clamp_min_(0).long()
    bonus = predicted.gather(1, index[:, None]).squeeze(1).masked_fill_(accept_lens == 0, pad_token)
    tokens = predicted.masked_fill_(column >= accept_lens[:, None], pad_token)
    return accept_lens.to(torch.int32), tokens, bonus, starts + index

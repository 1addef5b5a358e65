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
) -> Committed:
    """See `whiflash_kernels.block.accept_and_commit`."""
    if stride == 1 and qo_indptr.tolist() == list(range(qo_indptr.shape[0])):
        bonus = predictions[: seq_lens.shape[0]].clone()
        accepted = torch.ones_like(bonus, dtype=torch.int32)
        return Committed(accepted, bonus[:, None].clone(), bonus, seq_lens + 1)
    starts, widths = qo_indptr[:-1].long(), qo_indptr.diff().clamp_max_(stride)
    if predictions.numel() == 0 or widths.numel() == 0:
        empty = torch.zeros_like(widths)
        tokens = predictions.new_full((widths.numel(), stride), pad_token)
        return Committed(empty, tokens, predictions.new_full((widths.numel(),), pad_token), seq_lens.clone())
    column = torch.arange(stride, device=widths.device)
    # Rows past a request's width are read (clamped into the tensor) and then masked away.
    row = (starts[:, None] + column).clamp_max_(predictions.numel() - 1)
    predicted = predictions[row]
    drafted = input_ids[(row + 1).clamp_max_(predictions.numel() - 1)]
    agrees = (predicted == drafted) & (column < widths[:, None] - 1)
    accept_lens = agrees.cumprod(dim=1).sum(dim=1, dtype=torch.int32).add_(1).minimum(widths)
    last = predicted.gather(1, (accept_lens[:, None] - 1).clamp_min(0).long()).squeeze(1)
    return Committed(
        accept_lens=accept_lens,
        tokens=predicted.masked_fill(column >= accept_lens[:, None], pad_token),
        bonus=last.masked_fill(accept_lens == 0, pad_token),
        seq_lens=seq_lens + accept_lens.to(seq_lens.dtype),
    )

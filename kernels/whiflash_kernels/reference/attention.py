"""Gathered K and V, one scaled-dot-product attention for the batch."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def draft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    req_to_token: Tensor,
    request_slots: Tensor,
    seq_lens: Tensor,
    extra: int,
    width: int,
    causal: bool,
    scale: float,
    window: int | None,
) -> Tensor:
    """See `whiflash_kernels.attention.draft_attention`."""
    requests, heads, dim = request_slots.shape[0], q.shape[1], q.shape[2]
    kv_heads, groups = k.shape[1], heads // k.shape[1]
    ends = seq_lens.long() + extra
    longest = max(int(ends.max()), 0) if requests else 0
    if longest == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    entry = torch.arange(longest, device=q.device)
    position = (ends - width)[:, None] + torch.arange(width, device=q.device)
    last = position if causal else (ends - 1)[:, None].expand_as(position)
    seen = entry <= last[:, :, None]
    if window is not None:
        seen &= entry >= position[:, :, None] - window
    # What no row of a request sees is read from its first slot: it may hold anything but must not be NaN times 0.
    table = req_to_token[request_slots.long(), :longest].long()
    inside = entry < ends[:, None]
    slots = torch.where(inside, table, table[:, :1])
    keys, values = (
        pool[slots].masked_fill(~inside[:, :, None, None], 0.0).transpose(1, 2) for pool in (k, v)
    )
    rows = q.view(requests, width, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
    out = scaled_dot_product_attention(
        rows.reshape(requests, kv_heads, groups * width, dim),
        keys,
        values,
        attn_mask=seen[:, None, None].expand(-1, 1, groups, -1, -1).reshape(requests, 1, groups * width, -1),
        scale=scale,
    )
    out = out.view(requests, kv_heads, groups, width, dim).permute(0, 3, 1, 2, 4)
    out = out.reshape(requests, width, heads, dim)
    blind = ~seen.any(-1)
    return out.masked_fill(blind[:, :, None, None], 0.0).reshape(q.shape)

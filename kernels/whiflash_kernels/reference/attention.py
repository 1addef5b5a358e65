"""Draft attention in torch: gathered K and V, one scaled-dot-product attention for all requests, behind a mask.

On the CPU as many entries are gathered as the longest request has. Elsewhere reading lengths would wait for the device:
all requests are padded to ``longest``.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from whiflash_kernels.dispatch import op


@op()
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
    longest: int,
) -> Tensor:
    """Compute draft rows' attention over paged KV in torch; see `whiflash_kernels.attention.draft_attention`."""
    requests, groups = len(request_slots), q.shape[1] // k.shape[1]
    if not requests:
        return torch.empty_like(q)
    ends = seq_lens.long() + extra
    if q.device.type == "cpu":
        longest = max(int(ends.max()), 1)
    entry = torch.arange(longest, device=q.device)
    position = (ends - width)[:, None] + torch.arange(width, device=q.device)
    last = position if causal else (ends - 1)[:, None].expand_as(position)
    hidden = entry > last[:, :, None]
    if window is not None:
        hidden |= entry < position[:, :, None] - window
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    mask = mask[:, None].repeat(1, 1, groups, 1)
    table = req_to_token[:, :longest].index_select(0, request_slots)
    # Entries beyond a request's end are read from its first slot: other slots may hold NaN, which no mask hides.
    table = torch.where(entry < ends[:, None], table, table[:, :1])
    # The G query heads of a KV head become rows of one matrix, so K and V are never repeated.
    # `embedding` is the fastest row gather on a CPU.
    keys, values = (
        embedding(table.reshape(-1), pool.flatten(1)).to(q.dtype).view(requests, -1, *pool.shape[1:]).transpose(1, 2)
        for pool in (k, v)
    )
    kv_heads = k.shape[1]
    heads = q.view(requests, width, kv_heads, groups, -1).permute(0, 2, 3, 1, 4)
    rows = heads.reshape(requests, kv_heads, groups * width, -1)
    out = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    out = out.view(requests, kv_heads, groups, width, -1).permute(0, 3, 1, 2, 4).reshape(*q.shape[:2], -1)
    return out.masked_fill_((last < 0).reshape(-1, 1, 1), 0.0)

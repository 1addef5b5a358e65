"""Draft attention in torch: gathered K and V, one scaled-dot-product attention for requests of similar length.

On the CPU the lengths are known, so nothing is padded that grouping can spare and no mask is built that hides
nothing. Elsewhere reading them would wait for the device: all requests are padded to ``longest``, behind a mask.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from whiflash_kernels.dispatch import op
from whiflash_kernels.reference.grouping import group


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
    """See `whiflash_kernels.attention.draft_attention`."""
    if request_slots.shape[0] == 0:
        return torch.empty_like(q)
    ends = seq_lens.long() + extra
    if q.device.type != "cpu":
        return padded(q, k, v, req_to_token, request_slots, ends, width, causal, scale, window, longest)
    return grouped(q, k, v, req_to_token, request_slots, ends, width, causal, scale, window)


def padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    req_to_token: Tensor,
    request_slots: Tensor,
    ends: Tensor,
    width: int,
    causal: bool,
    scale: float,
    window: int | None,
    longest: int,
) -> Tensor:
    """All requests at once, as if each had ``longest`` entries; reads nothing on the host."""
    hidden = _hidden(ends, True, width, causal, window, q.shape[1] // k.shape[1], q.dtype, longest)
    return _Group(longest, None, None, *hidden).run(q, k, v, req_to_token, request_slots, scale)


def grouped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    req_to_token: Tensor,
    request_slots: Tensor,
    ends: Tensor,
    width: int,
    causal: bool,
    scale: float,
    window: int | None,
) -> Tensor:
    """Requests of similar length at once, those of padding not at all."""
    if window is not None:
        # Nothing before the first row's window is seen: entries are counted from there.
        context = req_to_token.shape[1]
        first = (ends - width - window).clamp(min=0)
        entry = first[:, None] + torch.arange(min(width + window, context))
        req_to_token = req_to_token[request_slots[:, None], entry.clamp(max=context - 1)]
        request_slots, ends = torch.arange(len(first)), ends - first
    groups = q.shape[1] // k.shape[1]
    layout = _layout(tuple(ends.tolist()), width, causal, window, groups, q.dtype)
    if len(layout) == 1 and layout[0].members is None:
        return layout[0].run(q, k, v, req_to_token, request_slots, scale)
    out = q.new_zeros(q.shape)
    for block in layout:
        out[block.rows] = block.run(q[block.rows], k, v, req_to_token, request_slots[block.members], scale)
    return out


class _Group(NamedTuple):
    """Requests that attend together, judged by their lengths only."""

    longest: int
    members: Tensor | None
    """[B] int64, which requests; None: all, in order."""
    rows: Tensor | None
    """[B * width] int64, their rows; None: all."""
    there: Tensor | None
    """[B, longest] bool, entries that a request has; None: all of them."""
    mask: Tensor | None
    """As of `gathered_attention`."""
    blind: Tensor | None
    """[B * width, 1, 1] bool, rows that see nothing; None: every row sees something."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, req_to_token: Tensor, request_slots: Tensor, scale: float
    ) -> Tensor:
        table = req_to_token[:, : self.longest].index_select(0, request_slots)
        if self.there is not None:
            # Entries that a request lacks are read from its first slot: elsewhere may be NaN, which no mask hides.
            table = torch.where(self.there, table, table[:, :1])
        out = gathered_attention(q, k, v, table.reshape(-1), self.mask, len(table), scale)
        return out if self.blind is None else out.masked_fill_(self.blind, 0.0)


@lru_cache(maxsize=2)
def _layout(
    lengths: tuple[int, ...], width: int, causal: bool, window: int | None, groups: int, dtype: torch.dtype
) -> list[_Group]:
    """Groups of similar length, and what hides entries in them; the layers of a pass share it."""
    live = [i for i, end in enumerate(lengths) if end > 0]
    parts = []
    for members in group(live, [width] * len(lengths), lengths):
        ends = torch.tensor([lengths[i] for i in members])
        index = rows = None
        if len(members) < len(lengths):
            index = torch.tensor(members)
            rows = (index[:, None] * width + torch.arange(width)).flatten()
        ragged = int(ends.min()) < int(ends.max())
        parts.append(
            _Group(int(ends.max()), index, rows, *_hidden(ends, ragged, width, causal, window, groups, dtype))
        )
    return parts


def _hidden(
    ends: Tensor,
    ragged: bool,
    width: int,
    causal: bool,
    window: int | None,
    groups: int,
    dtype: torch.dtype,
    longest: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`there`, `mask` and `blind` of requests with ``ends`` [B] entries; ``ragged``: they may differ.

    ``longest``: entries a request gets; None: as many as the longest request has.
    """
    rows_differ = (causal and width > 1) or window is not None
    if not (ragged or rows_differ):
        return None, None, None
    entry = torch.arange(int(ends.max()) if longest is None else longest, device=ends.device)
    position = (ends - width)[:, None] + torch.arange(width, device=ends.device)
    last = position if causal else (ends - 1)[:, None]
    hidden = entry > last[:, :, None]
    if window is not None:
        hidden = hidden | (entry < position[:, :, None] - window)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=ends.device).masked_fill_(hidden, float("-inf"))
    mask = mask[:, None]
    if rows_differ:
        mask = mask.repeat(1, 1, groups, 1)
    blind = position < 0 if causal else (ends <= 0)[:, None].expand_as(position)
    return entry < ends[:, None] if ragged else None, mask, blind.reshape(-1, 1, 1)


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, mask: Tensor | None, requests: int, scale: float
) -> Tensor:
    """Attention of requests of equal width to equally many entries each, copied together.

    The G query heads of a KV head become rows of one matrix, so K and V are never repeated.

    Args:
        q: [B * width, Hq, D]. k: [S, Hkv, D], v: [S, Hkv, Dv], both contiguous; another dtype than q's is converted.
        slots: [B * entries] int. mask: [B, 1, G * width or 1, entries] in q's dtype, added to the scores of the rows,
            which are in the order of the heads; None: everything is seen.

    Returns:
        [B * width, Hq, Dv] in q's dtype, new.
    """
    heads, dim = q.shape[1], q.shape[2]
    kv_heads, v_dim = k.shape[1], v.shape[2]
    width, groups = q.shape[0] // requests, heads // kv_heads
    # `embedding` is the fastest row gather on a CPU.
    keys, values = (
        embedding(slots, pool.flatten(1))
        .to(q.dtype)
        .view(requests, -1, kv_heads, pool.shape[2])
        .transpose(1, 2)
        for pool in (k, v)
    )
    if width == 1:
        rows = q.reshape(requests, kv_heads, groups, dim)
    else:
        by_head = q.view(requests, width, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
        rows = by_head.reshape(requests, kv_heads, groups * width, dim)
    out = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    if width > 1:
        out = out.reshape(requests, kv_heads, groups, width, v_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(requests * width, heads, v_dim)

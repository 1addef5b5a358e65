"""Ragged attention over a paged KV pool in plain torch, one request at a time.

    out[t, h] = softmax_j(scale * q[t, h] . K[slot(r, j), h // G]) @ V[slot(r, j), h // G]

for query row ``t`` of request ``r``, over the KV entries ``j`` that the row may see, with ``G = Hq // Hkv``
query heads per KV head. A :class:`PagedAttentionPlan` is built once per forward from host-side lengths and is
then run by every layer; the layers share its slots and masks.

The ``G`` query heads of a KV head become rows of one matrix, so KV heads are never repeated. A request's rows are cut
into blocks of ``ROWS`` that read only the keys they need; a mask is built only where a row must not see all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.functional import embedding

ROWS = 32
"""Query rows per block: few, so that the scores stay in the CPU's caches."""


Block = tuple[slice, slice, torch.Tensor | None]
"""Rows of the plan's q, the entries of their request's ``slots`` that they may see, and a mask that is added to their
scores: [rows, entries or the last few of them] fp32, or None if all are seen."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the slots that any of its rows sees, and the blocks its rows are cut into.

    Products of matrices instead of torch's fused attention, which takes no sinks and has no fast product in bf16 on a
    CPU without matrix units: 1,000 causal rows of 9 heads took 12 ms a layer on one thread, fused 19 to 22. All of them
    are fp32.
    """

    slots: torch.Tensor  # [entries] int64
    blocks: tuple[Block, ...]

    def run_into(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Fill this request's rows of ``out`` [T, Hq, Dv]."""
        heads, dim = q.shape[1], q.shape[2]
        kv_heads, v_dim, groups = k_cache.shape[1], v_cache.shape[2], heads // k_cache.shape[1]
        # `embedding` is the fastest row gather on a CPU.
        k, v = (embedding(self.slots, cache.flatten(1)).float() for cache in (k_cache, v_cache))
        k, v = k.view(-1, kv_heads, dim).permute(1, 2, 0), v.view(-1, kv_heads, v_dim).transpose(0, 1)
        for own, entries, mask in self.blocks:
            rows = own.stop - own.start
            by_head = q[own].reshape(rows, kv_heads, groups, dim).permute(1, 2, 0, 3)
            scaled = by_head.reshape(kv_heads, groups * rows, dim).float() * scale
            scores = torch.bmm(scaled, k[:, :, entries])
            if mask is not None:
                scores.view(kv_heads, groups, rows, -1)[..., -mask.shape[1] :] += mask
            if sinks is None:
                weights = scores.softmax(-1)
            else:
                by_row = sinks.view(kv_heads, groups, 1).expand(-1, -1, rows).reshape(kv_heads, -1)
                weights = softmax_beside(scores, by_row)
            attended = torch.bmm(weights, v[:, entries]).view(kv_heads, groups, rows, v_dim)
            out[own] = attended.permute(2, 0, 1, 3).reshape(rows, heads, v_dim)


def softmax_beside(scores: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Return the softmax over the last dimension of ``scores`` [..., n] fp32 and one more score, ``sinks`` [...], which
    takes its share and has no value (attention sinks; gpt-oss has one per head)."""
    beside = sinks.to(scores.dtype)[..., None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, beside], -1).softmax(-1)[..., :-1]


@dataclass(frozen=True, slots=True)
class PagedAttentionPlan:
    """The part of one forward's attention that is the same in all layers. Build once, run per layer."""

    num_rows: int
    requests: tuple[Request, ...]

    @staticmethod
    def build(
        slot_table: torch.Tensor,
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        *,
        causal: bool,
        request_rows: torch.Tensor | None = None,
        window: int | None = None,
    ) -> "PagedAttentionPlan":
        """Plan the attention of a batch of ``bs`` requests.

        Args:
            slot_table: [bs or more, >= max(kv_lens)] int32/int64, the KV slot of every position of a request.
            q_lens: query rows of each request, on the host. The rows of ``q`` are packed in this order.
            kv_lens: entries that the *last* query row of each request may see, its own included.
            causal: row i of a request with m rows and n entries sees entries 0..n-m+i; otherwise all n.
            request_rows: [bs] int, the row of ``slot_table`` of each request; None: rows 0..bs-1.
            window: with ``causal``, a row at position p sees entries p-window..p only; ignored without.

        Raises:
            ValueError: lengths that do not fit each other or the slot table.
        """
        check_lengths(slot_table, q_lens, kv_lens, causal)
        if request_rows is not None:
            slot_table = slot_table[:, : max(kv_lens, default=0)].index_select(0, request_rows)
        *starts, num_rows = accumulate(q_lens, initial=0)
        requests = tuple(
            _planned(slot_table[i], starts[i], m, kv_lens[i], causal, window if causal else None)
            for i, m in enumerate(q_lens)
            if m
        )
        return PagedAttentionPlan(num_rows, requests)

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute one layer's attention.

        Args:
            q: [T, Hq, D], T = sum(q_lens), rows packed per request.
            k_cache: [S, Hkv, D], contiguous; the rows' own K is already in it.
            v_cache: [S, Hkv, Dv], contiguous.
            scale: softmax scale.
            sinks: [Hq] any float type, the score of one more entry without a value; None: there is none.

        Returns:
            [T, Hq, Dv] in q's dtype, a new tensor.
        """
        out = q.new_empty((self.num_rows, q.shape[1], v_cache.shape[2]))
        for request in self.requests:
            request.run_into(out, q, k_cache, v_cache, scale, sinks)
        return out


def check_lengths(slot_table: torch.Tensor, q_lens: Sequence[int], kv_lens: Sequence[int], causal: bool) -> None:
    if len(q_lens) != len(kv_lens):
        raise ValueError(f"q_lens has {len(q_lens)} requests but kv_lens has {len(kv_lens)}")
    for i, (m, n) in enumerate(zip(q_lens, kv_lens, strict=True)):
        if m < 0 or (m > 0 and n < 1) or (causal and m > n):
            raise ValueError(f"request {i}: {m} query rows do not fit {n} KV entries (causal={causal})")
    if kv_lens and max(kv_lens) > slot_table.shape[1]:
        raise ValueError(f"a request has {max(kv_lens)} KV entries, the slot table {slot_table.shape[1]}")


def _planned(
    table_row: torch.Tensor, row_start: int, q_len: int, kv_len: int, causal: bool, window: int | None
) -> Request:
    prefix, device = kv_len - q_len, table_row.device
    widest = min(q_len, ROWS)
    square = _additive_mask(widest, widest, 0, None, device)
    seen = 0 if window is None else max(0, prefix - window)
    blocks = list[Block]()
    for first in range(0, q_len, ROWS):
        last = min(first + ROWS, q_len)
        rows = last - first
        kv_start = 0 if window is None else max(0, prefix + first - window)
        kv_end = prefix + last if causal else kv_len
        mask = None
        if causal and rows > 1:  # a row alone sees all entries of its block
            mask = square[:rows, :rows]
            if window is not None:
                mask = _additive_mask(rows, kv_end - kv_start, prefix + first - kv_start, window, device)
        own, entries = slice(row_start + first, row_start + last), slice(kv_start - seen, kv_end - seen)
        blocks.append((own, entries, mask))
    return Request(table_row[seen:kv_len].to(torch.int64), tuple(blocks))


def _additive_mask(rows: int, entries: int, own: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return a mask of 0 and -inf, [rows, entries] fp32: row i sees entries up to ``own + i``, with a window only those
    from ``own + i - window`` on.
    """
    hidden = torch.full((rows, entries), float("-inf"), device=device)
    mask = hidden.triu(own + 1)
    return mask if window is None else mask + hidden.tril(own - window - 1)

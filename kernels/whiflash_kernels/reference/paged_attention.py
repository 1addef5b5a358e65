"""Batched ragged attention over a paged KV pool, in plain torch.

    out[t, h] = softmax_j(scale * q[t, h] . K[slot(r, j), h // G]) @ V[slot(r, j), h // G]

for query row ``t`` of request ``r``, over the KV entries ``j`` that the row may see, with ``G = Hq // Hkv``
query heads per KV head. A :class:`PagedAttentionPlan` is built once per forward from host-side lengths and is
then run by every layer; the layers share its slots and masks.

How a batch is laid out:

* Narrow requests (up to ``NARROW_ROWS`` query rows: decoding, verification, draft blocks, chain steps) form
  groups of similar size (:mod:`whiflash_kernels.reference.grouping`): one gather of K, one of V, one
  scaled-dot-product call a group. The ``G`` query heads of a KV head become ``G * M`` rows of one matrix, so KV heads
  are never repeated. A request shorter than the group's longest reads its own last entry again behind a mask, never
  a foreign slot.
* Wide requests (prefill) run one by one, in blocks of ``WIDE_ROWS`` rows that see only the keys they need.

A mask is built only where a row must not see everything that was gathered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import embedding

from whiflash_kernels.processor import onednn_has_bfloat16
from whiflash_kernels.reference.attention import gathered_attention
from whiflash_kernels.reference.grouping import group


@dataclass(frozen=True, slots=True)
class NarrowGroup:
    """Requests padded to ``width`` query rows and ``kv_width`` entries, run as one batch of size ``bs``."""

    bs: int
    width: int
    kv_width: int
    slots: torch.Tensor  # [bs * kv_width] int64
    mask: torch.Tensor | None  # [bs, 1, 1, width, kv_width] dtype, additive
    gather_rows: torch.Tensor | None  # [bs * width] int64 into q; None: q is already [bs * width] rows
    scatter_rows: torch.Tensor | None  # rows of the group's padded output, in the order of `targets`
    targets: torch.Tensor | None  # rows of the plan's output that they fill; None: all of them, in order
    row_masks: dict[int, torch.Tensor] = field(default_factory=dict)

    def row_mask(self, groups: int) -> torch.Tensor | None:
        """The mask of shape ``[bs, 1, groups * width, kv_width]``, kept for the next layer."""
        if self.mask is None:
            return None
        mask = self.row_masks.get(groups)
        if mask is None:
            shape = (self.bs, 1, groups, self.width, self.kv_width)
            mask = self.mask.expand(shape).reshape(self.bs, 1, groups * self.width, self.kv_width)
            self.row_masks[groups] = mask
        return mask

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the group's own rows: [rows of the group, Hq, Dv]."""
        heads, dim = q.shape[1], q.shape[2]
        if self.gather_rows is not None:
            q = embedding(self.gather_rows, q.reshape(-1, heads * dim)).view(-1, heads, dim)
        if sinks is None:
            mask = self.row_mask(heads // k_cache.shape[1])
            out = gathered_attention(q, k_cache, v_cache, self.slots, mask, self.bs, scale)
        else:
            out = self._with_sinks(q, k_cache, v_cache, scale, sinks)
        if self.scatter_rows is not None:
            out = embedding(self.scatter_rows, out.flatten(1)).view(-1, *out.shape[1:])
        return out

    def _with_sinks(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float, sinks: torch.Tensor
    ) -> torch.Tensor:
        """The same by products of matrices, scores and softmax in fp32: torch's fused attention takes no sinks."""
        heads, kv_heads = q.shape[1], k_cache.shape[1]
        rows = q.view(self.bs, self.width, kv_heads, heads // kv_heads, -1).permute(0, 2, 3, 1, 4)
        k, v = (
            _gather(cache, self.slots, q.dtype).view(self.bs, self.kv_width, kv_heads, -1).transpose(1, 2)
            for cache in (k_cache, v_cache)
        )
        scores = torch.matmul(rows.float() * scale, k[:, :, None].transpose(-1, -2).float())
        if self.mask is not None:
            scores += self.mask
        v = v.to(_product_dtype(q))
        weights = softmax_beside(scores, sinks.view(kv_heads, -1, 1)).to(v.dtype)
        out = torch.matmul(weights, v[:, :, None]).permute(0, 3, 1, 2, 4).reshape(len(q), heads, -1)
        return out.to(q.dtype)


def _product_dtype(q: torch.Tensor) -> torch.dtype:
    """Dtype of the product of weights and values: float32 on a CPU with slow products of bfloat16 (some 17 times)."""
    slow = q.dtype == torch.bfloat16 and q.device.type == "cpu" and not onednn_has_bfloat16()
    return torch.float32 if slow else q.dtype


def softmax_beside(scores: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension of ``scores`` [..., n] fp32 and one more entry, of score ``sinks`` [...], which
    takes its share and has no value (attention sinks, as gpt-oss has one a head)."""
    beside = sinks.to(scores.dtype)[..., None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, beside], -1).softmax(-1)[..., :-1]


@dataclass(frozen=True, slots=True)
class WideBlock:
    """Rows ``[row_start, row_end)`` of the plan's q against entries ``[kv_start, kv_end)`` of its request."""

    row_start: int
    row_end: int
    kv_start: int
    kv_end: int
    mask: torch.Tensor | None  # [rows, entries or the last few of them] fp32, additive; None: all are seen


@dataclass(frozen=True, slots=True)
class WideRequest:
    """One prefill-sized request: its slots from ``kv_base`` on, and the blocks its rows are cut into.

    Products of matrices instead of torch's fused attention, which has no fast product in bf16 on a CPU without matrix
    units: 1,000 causal rows of 9 heads took 12 ms a layer on one thread, fused 19 to 22. Scores and softmax are fp32.
    """

    slots: torch.Tensor  # [entries] int64
    kv_base: int
    blocks: tuple[WideBlock, ...]

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
        kv_heads, v_dim = k_cache.shape[1], v_cache.shape[2]
        groups = heads // kv_heads
        k = _gather(k_cache, self.slots, q.dtype).view(-1, kv_heads, dim).permute(1, 2, 0).float()
        v = _gather(v_cache, self.slots, q.dtype).view(-1, kv_heads, v_dim).transpose(0, 1)
        v = v.to(_product_dtype(q))
        for block in self.blocks:
            rows = block.row_end - block.row_start
            entries = slice(block.kv_start - self.kv_base, block.kv_end - self.kv_base)
            by_head = (
                q[block.row_start : block.row_end].reshape(rows, kv_heads, groups, dim).permute(1, 2, 0, 3)
            )
            scaled = by_head.reshape(kv_heads, groups * rows, dim).float() * scale
            scores = torch.bmm(scaled, k[:, :, entries])
            if block.mask is not None:
                scores.view(kv_heads, groups, rows, -1)[..., -block.mask.shape[1] :] += block.mask
            if sinks is None:
                weights = scores.softmax(-1).to(v.dtype)
            else:
                by_row = sinks.view(kv_heads, groups, 1).expand(-1, -1, rows).reshape(kv_heads, -1)
                weights = softmax_beside(scores, by_row).to(v.dtype)
            attended = torch.bmm(weights, v[:, entries]).view(kv_heads, groups, rows, v_dim)
            out[block.row_start : block.row_end] = attended.permute(2, 0, 1, 3).reshape(rows, heads, v_dim)


def _gather(cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a [S, H, D] cache as [len(slots), H * D]; `embedding` is the fastest row gather on a CPU."""
    rows = embedding(slots, cache.view(cache.shape[0], -1))
    return rows if rows.dtype == dtype else rows.to(dtype)


NARROW_ROWS = 64
"""Widest request, in query rows, that joins a group of others."""

WIDE_ROWS = 32
"""Query rows of one block of a wide request: few, so that scores stay near the cores."""


@dataclass(frozen=True, slots=True)
class PagedAttentionPlan:
    """Everything of one forward's attention that does not depend on the layer. Build once, run per layer."""

    num_rows: int
    narrow: tuple[NarrowGroup, ...]
    wide: tuple[WideRequest, ...]

    @staticmethod
    def build(
        slot_table: torch.Tensor,
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        *,
        causal: bool,
        dtype: torch.dtype,
        request_rows: torch.Tensor | None = None,
        window: int | None = None,
    ) -> "PagedAttentionPlan":
        """Plan the attention of a batch of ``bs`` requests.

        Args:
            slot_table: [bs or more, >= max(kv_lens)] int32/int64, the KV slot of every position of a request.
            q_lens: query rows of each request, on the host. The rows of ``q`` are packed in this order.
            kv_lens: entries that the *last* query row of each request may see, its own included.
            causal: row i of a request with m rows and n entries sees entries 0..n-m+i; otherwise all n.
            dtype: dtype of q (masks are made in it).
            request_rows: [bs] int, the row of ``slot_table`` of each request; None: rows 0..bs-1.
            window: with ``causal``, a row at position p sees entries p-window..p only; ignored without.

        Raises:
            ValueError: lengths that do not fit each other or the slot table.
        """
        check_lengths(slot_table, q_lens, kv_lens, causal)
        if request_rows is not None:
            slot_table = slot_table[:, : max(kv_lens, default=0)].index_select(0, request_rows)
        if not causal:
            window = None
        starts = [0]
        for length in q_lens:
            starts.append(starts[-1] + length)
        narrow = [i for i, m in enumerate(q_lens) if 0 < m <= NARROW_ROWS]
        wide = tuple(
            _plan_wide(slot_table[i], starts[i], m, kv_lens[i], causal, window)
            for i, m in enumerate(q_lens)
            if m > NARROW_ROWS
        )
        seen = (
            kv_lens if window is None else [min(n, m + window) for m, n in zip(q_lens, kv_lens, strict=True)]
        )
        groups = tuple(
            _plan_narrow(slot_table, members, starts, q_lens, kv_lens, causal, dtype, window)
            for members in group(narrow, q_lens, seen)
        )
        return PagedAttentionPlan(num_rows=starts[-1], narrow=groups, wide=wide)

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer's attention.

        Args:
            q: [T, Hq, D], T = sum(q_lens), rows packed per request.
            k_cache: [S, Hkv, D], contiguous; the rows' own K is already in it.
            v_cache: [S, Hkv, Dv], contiguous.
            scale: softmax scale.
            sinks: [Hq] any float type, the score of one more entry without a value; None: there is none.

        Returns:
            [T, Hq, Dv] in q's dtype, a new tensor.
        """
        if len(self.narrow) == 1 and not self.wide:
            return self.narrow[0].run(q, k_cache, v_cache, scale, sinks)
        out = q.new_empty((self.num_rows, q.shape[1], v_cache.shape[2]))
        for narrow in self.narrow:
            if narrow.targets is None:
                raise AssertionError("a narrow group beside other requests always has targets")
            out.index_copy_(0, narrow.targets, narrow.run(q, k_cache, v_cache, scale, sinks))
        for request in self.wide:
            request.run_into(out, q, k_cache, v_cache, scale, sinks)
        return out


def check_lengths(
    slot_table: torch.Tensor, q_lens: Sequence[int], kv_lens: Sequence[int], causal: bool
) -> None:
    if len(q_lens) != len(kv_lens):
        raise ValueError(f"q_lens has {len(q_lens)} requests but kv_lens has {len(kv_lens)}")
    for i, (m, n) in enumerate(zip(q_lens, kv_lens, strict=True)):
        if m < 0 or (m > 0 and n < 1) or (causal and m > n):
            raise ValueError(f"request {i}: {m} query rows do not fit {n} KV entries (causal={causal})")
    if kv_lens and max(kv_lens) > slot_table.shape[1]:
        raise ValueError(f"a request has {max(kv_lens)} KV entries, the slot table {slot_table.shape[1]}")


def _plan_narrow(
    slot_table: torch.Tensor,
    members: list[int],
    starts: list[int],
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    causal: bool,
    dtype: torch.dtype,
    window: int | None,
) -> NarrowGroup:
    device = slot_table.device
    bs = len(members)
    widths = [q_lens[i] for i in members]
    ends = [kv_lens[i] for i in members]
    firsts = [0] * bs
    if window is not None:
        firsts = [max(0, n - m - window) for m, n in zip(widths, ends, strict=True)]
    width = max(widths)
    spans = [n - first for n, first in zip(ends, firsts, strict=True)]
    kv_width = max(spans)
    uniform = min(widths) == width and min(spans) == kv_width

    if bs == 1:
        slots = slot_table[members[0], firsts[0] : ends[0]].to(torch.int64)
        mask = None
        if width > 1 and causal:
            mask = _additive_mask(width, ends[0] - width, firsts[0], kv_width, window, dtype, device)
            mask = mask.view(1, 1, 1, width, kv_width)
    else:
        table = slot_table if bs == len(q_lens) else slot_table[torch.tensor(members, device=device)]
        end = torch.tensor(ends, device=device)[:, None]
        entry = torch.tensor(firsts, device=device)[:, None] + torch.arange(kv_width, device=device)
        slots = table.gather(1, torch.minimum(entry, end - 1)).view(-1).to(torch.int64)
        mask = None
        if not uniform or (causal and width > 1):
            width_of = torch.tensor(widths, device=device)[:, None]
            row = torch.arange(width, device=device)
            # The last entry a row may see; padding rows repeat the request's last row.
            last = torch.minimum(end - width_of + row, end - 1) if causal else (end - 1).expand(bs, width)
            hidden = entry[:, None, :] > last[:, :, None]
            if window is not None:
                hidden |= entry[:, None, :] < last[:, :, None] - window
            mask = torch.zeros(bs, width, kv_width, dtype=dtype, device=device)
            mask = mask.masked_fill_(hidden, float("-inf")).view(bs, 1, 1, width, kv_width)

    every_row = sum(widths) == starts[-1]
    gather_rows = scatter_rows = targets = None
    if min(widths) != width or not every_row:
        row_ids = [
            starts[i] + min(j, m - 1) for i, m in zip(members, widths, strict=True) for j in range(width)
        ]
        gather_rows = torch.tensor(row_ids, device=device)
    if min(widths) != width:
        scatter_rows = torch.tensor(
            [b * width + j for b, m in enumerate(widths) for j in range(m)], device=device
        )
    if not every_row:
        targets = torch.tensor([starts[i] + j for i in members for j in range(q_lens[i])], device=device)
    return NarrowGroup(bs, width, kv_width, slots, mask, gather_rows, scatter_rows, targets)


def _plan_wide(
    table_row: torch.Tensor, row_start: int, q_len: int, kv_len: int, causal: bool, window: int | None
) -> WideRequest:
    prefix = kv_len - q_len
    kv_base = 0 if window is None else max(0, prefix - window)
    widest = min(q_len, WIDE_ROWS)
    square = _additive_mask(widest, 0, 0, widest, None, torch.float32, table_row.device) if causal else None
    blocks = []
    for first in range(0, q_len, WIDE_ROWS):
        last = min(first + WIDE_ROWS, q_len)
        rows = last - first
        kv_start, kv_end = 0, prefix + last if causal else kv_len
        mask = None if square is None else square[:rows, :rows]
        if window is not None:
            kv_start = max(0, prefix + first - window)
            entries = kv_end - kv_start
            mask = _additive_mask(
                rows, prefix + first, kv_start, entries, window, torch.float32, table_row.device
            )
        blocks.append(WideBlock(row_start + first, row_start + last, kv_start, kv_end, mask))
    return WideRequest(table_row[kv_base:kv_len].to(torch.int64), kv_base, tuple(blocks))


def _additive_mask(
    rows: int,
    first_row_position: int,
    first_entry: int,
    entries: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """[rows, entries] of 0 and -inf: row i, at position p + i, sees entries up to its own position."""
    mask = torch.full((rows, entries), float("-inf"), dtype=dtype, device=device)
    mask.triu_(first_row_position - first_entry + 1)
    if window is not None:
        position = first_row_position + torch.arange(rows, device=device)[:, None]
        entry = first_entry + torch.arange(entries, device=device)
        mask.masked_fill_(entry < position - window, float("-inf"))
    return mask

"""One layer's attention over gathered KV entries: the two layouts that a paged attention plan is made of."""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import embedding

from whiflash_kernels.processor import onednn_has_bfloat16
from whiflash_kernels.reference.attention import gathered_attention


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
    """Of the product of weights and values: float32 on a CPU whose products of bfloat16 are slow, some 17 times."""
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

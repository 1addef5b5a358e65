"""FlashInfer's wrapper for paged attention in a graph, on a CPU: its plan on the host, and what its kernel does then.

`begin_forward` refuses what FlashInfer 0.7.2 refuses of a wrapper for graphs, fills the buffers that the graph reads,
and plans as `PrefillPlan` does (`scheduler.cuh`, whose own code `tests/compat/test_flashinfer_plans.py` runs): tiles of
queries times chunks of keys, spread over as many blocks as the capture fixed, the rest marked as not valid. `forward`
is made of torch's operators on those buffers, and of the numbers of the plan that was made last before it was recorded:
as in a graph, all that a later plan may change lies in memory.
"""

from itertools import pairwise
from math import ceil
from typing import Any, NamedTuple

import torch

SMS = 6
"""Multiprocessors of a card that is small enough to have to share blocks."""
SHORTEST_CHUNK = 8
"""Keys of a block at least: 128 in FlashInfer, longer than the contexts of tests."""


class PlanInfo(NamedTuple):
    """What a captured launch knows of its plan: the rest lies in memory, `blocks` numbers each."""

    blocks: int
    tile: int
    group: int


class PagedWrapper:
    """`BatchPrefillWithPagedKVCacheWrapper(use_cuda_graph=True)`, of which every plan is kept in `planned`."""

    is_cuda_graph_enabled = True
    _custom_mask_buf = None
    _block_tables = None

    def __init__(
        self,
        workspace: torch.Tensor,
        kv_layout: str,
        *,
        use_cuda_graph: bool,
        backend: str,
        qo_indptr_buf: torch.Tensor,
        paged_kv_indptr_buf: torch.Tensor,
        paged_kv_indices_buf: torch.Tensor,
        paged_kv_last_page_len_buf: torch.Tensor,
    ) -> None:
        assert (use_cuda_graph, backend, kv_layout) == (True, "fa2", "NHD")
        self.requests = len(qo_indptr_buf) - 1
        if len(paged_kv_indptr_buf) != self.requests + 1:
            raise ValueError("The length of paged_kv_indptr_buf should be batch_size + 1.")
        if len(paged_kv_last_page_len_buf) != self.requests:
            raise ValueError("The length of paged_kv_last_page_len_buf should be batch_size.")
        self.rows, self.keys, self.indices = qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf
        self._int_workspace_buffer = torch.zeros(1 << 14, dtype=torch.int32)
        self._pin_memory_int_workspace_buffer = torch.zeros(1 << 14, dtype=torch.int32)
        self.most: int | None = None
        self.planned: list[tuple[list[int], list[int]]] = []

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **_: Any,
    ) -> None:
        rows, keys = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self.most = rows[-1] if self.most is None else self.most
        if rows[-1] > self.most:
            raise ValueError(f"{rows[-1]} rows, {self.most} when captured")
        if len(rows) - 1 != self.requests or paged_kv_last_page_len.tolist() != [1] * self.requests:
            raise ValueError(f"{len(rows) - 1} requests, {self.requests} when captured")
        if max(len(paged_kv_indices), keys[-1]) > len(self.indices):
            raise ValueError("The length of paged_kv_indices exceeds the allocated buffer size.")
        assert len(paged_kv_indices) >= keys[-1]
        self.rows.copy_(qo_indptr)
        self.keys.copy_(paged_kv_indptr)
        self.indices[: len(paged_kv_indices)].copy_(paged_kv_indices)
        self.planned.append((rows, keys))
        self._plan(rows, keys, num_qo_heads // num_kv_heads, 2 * SMS // num_kv_heads)

    def _plan(self, rows: list[int], keys: list[int], group: int, together: int) -> None:
        assert self.most is not None
        longest = (self.most - self.requests + 1) * group
        tile = 16 if longest <= 16 else 64 if longest <= 64 else 128
        blocks = max(together, ceil(self.most * group / tile) + self.requests - 1)
        tiles = [ceil((b - a) * group / tile) for a, b in pairwise(rows)]
        lengths = [max(b - a, 1) for a, b in pairwise(keys)]

        def work(chunk: int) -> int:
            return sum(n * ceil(length / chunk) for n, length in zip(tiles, lengths, strict=True))

        chunk, high = SHORTEST_CHUNK, max(lengths)
        while chunk < high:
            middle = (chunk + high) // 2
            chunk, high = (middle + 1, high) if work(middle) > together else (chunk, middle)
        items = [
            (request, tile_of, part)
            for request, (n, length) in enumerate(zip(tiles, lengths, strict=True))
            for tile_of in range(n)
            for part in range(ceil(length / chunk))
        ]
        assert len(items) <= blocks, "new batch size should not exceed padded batch size"
        host = self._pin_memory_int_workspace_buffer
        # Of blocks without work FlashInfer writes nothing but that they are not valid.
        for column in range(3):
            host[column * blocks :][: len(items)] = torch.tensor([item[column] for item in items])
        host[3 * blocks : 4 * blocks] = torch.arange(blocks) < len(items)
        host[4 * blocks] = chunk
        self._int_workspace_buffer.copy_(host)
        self.info = PlanInfo(blocks, tile, group)

    def forward(
        self,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        causal: bool,
        sm_scale: float,
        **_: Any,
    ) -> torch.Tensor:
        """q: [T, H, D]; keys and values: [S, Hkv, D] → [T, H, D]; NaN where no block came."""
        (blocks, tile, group), (total, heads, size) = self.info, q.shape
        assert causal
        keys, values = kv_cache
        plan = self._int_workspace_buffer.long()
        valid, chunk = plan[3 * blocks : 4 * blocks] > 0, plan[4 * blocks]
        request, tile_of, part = torch.where(valid, plan[: 3 * blocks].view(3, blocks), 0)
        # Queries of a tile: rows and heads of one key head, packed.
        packed = tile_of[:, None] * tile + torch.arange(tile)
        first, count = self.rows[request][:, None], self.rows.diff()[request][:, None]
        live = valid[:, None] & (packed < count * group)
        row = torch.where(live, first + packed // group, total)  # the last row is nobody's
        kv_heads = heads // group
        head = torch.arange(kv_heads) * group + (packed % group)[..., None]
        padded = torch.cat([q, q.new_zeros(1, heads, size)])
        query = padded[row[..., None], head]  # [blocks, tile, Hkv, D]
        # Keys of a chunk.
        inside = torch.arange(keys.shape[0])[: len(self.indices) // self.requests]
        at, known = part[:, None] * chunk + inside, self.keys.diff()[request][:, None]
        seen = (inside < chunk) & (at < known)
        where = torch.where(seen, self.keys[request][:, None] + at, 0)
        slot = torch.where(seen, self.indices[where].long(), 0)
        scores = torch.einsum("btkd,bckd->btkc", query, keys[slot]) * sm_scale
        last = known - count + packed // group
        visible = seen[:, None] & (at[:, None] <= last[..., None])
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
        # Partial results of all chunks are merged by row and head.
        owner = (row[..., None] * heads + head).flatten()
        best = scores.new_full(((total + 1) * heads,), -torch.inf)
        best = best.scatter_reduce(0, owner, scores.amax(-1).flatten(), "amax")
        weights = (scores - best[owner].view(*scores.shape[:-1], 1)).exp()
        parts = torch.einsum("btkc,bckd->btkd", weights, values[slot]).flatten(0, 2)
        out = parts.new_zeros((total + 1) * heads, size).index_add(0, owner, parts)
        norm = parts.new_zeros((total + 1) * heads).index_add(0, owner, weights.sum(-1).flatten())
        return (out / norm[:, None]).view(total + 1, heads, size)[:total]

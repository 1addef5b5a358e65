"""What every neural arm shares: KV beside the target's slots, attention over it, drafts as long as they pay."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from whiflash_kernels import draft_attention

from whiflash_sglang.cache.draft_kv import DraftKV
from whiflash_sglang.drafters.base import DraftBatch, Drafter, Drafts
from whiflash_sglang.drafters.length import DraftLength
from whiflash_sglang.models.dflash_config import LayerSpan
from whiflash_sglang.models.layers import Attend, AttentionShape


class PassInput(NamedTuple):
    """All that a draft pass reads, beside weights and KV: device tensors, and one host bound that sizes launches.

    A pass is a function of these and of shapes. It reads no value of them on the host, so a capture of G requests stays
    right when the tensors are refilled in place: a padding request has row 0 and `starts` of at most `PADDING`, sees
    nothing, and writes to slot 0, which belongs to nobody.

    rows: [G] int64 rows of `slot_table`. starts: [G] int64, n per request. bonus: [G] int64, token n.
    tail: [G, F] captured feature n-1. slot_table: [request rows, ctx] int32. longest: the largest n at most.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    bonus: torch.Tensor
    tail: torch.Tensor
    slot_table: torch.Tensor
    longest: int

    @classmethod
    def of(cls, batch: DraftBatch) -> "PassInput":
        """The device's part of a batch."""
        return cls(batch.rows, batch.starts, batch.bonus, batch.tail, batch.slot_table, max(batch.lengths))

    def positions(self, offset: int, width: int) -> torch.Tensor:
        """n+offset … n+offset+width-1: [G, width] int64."""
        return self.starts[:, None] + torch.arange(offset, offset + width, device=self.starts.device)

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """KV slots of `positions` [G, width]: the same shape, int64."""
        found = self.slot_table[self.rows[:, None], positions.clamp(min=0)]
        return found.to(torch.int64).masked_fill_(positions < 0, 0)


PADDING = -(1 << 20)
"""`starts` of a padding request: before position 0 at whatever step."""


class PagedArm(Drafter):
    """Base of the arms that keep KV.

    Args:
        layers: draft layers with KV. shape: heads of each. dtype, device: the target's.
    """

    keeps_kv = True
    judges = True
    kv: DraftKV

    def __init__(self, layers: int, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        self._layers, self._shape, self._dtype, self._device = layers, shape, dtype, device
        self.length = DraftLength(device)

    def kv_bytes_per_token(self) -> int:
        """Bytes its KV adds to one target slot."""
        return DraftKV.bytes_per_token(self._layers, self._shape.kv_heads, self._shape.head_dim, self._dtype)

    def allocate(self, slots: int) -> None:
        """Allocate KV for `slots` target slots."""
        shape = self._shape
        self.kv = DraftKV(self._layers, slots, shape.kv_heads, shape.head_dim, self._dtype, self._device)

    def calibration(self, row_ids: Sequence[int]) -> Sequence[float]:
        """Chances of acceptance per bin of confidence, and their mean."""
        return self.length.calibration()

    def cut(
        self, tokens: torch.Tensor, confidences: torch.Tensor, batch: DraftBatch, *, passes: int = 1
    ) -> Drafts:
        """`tokens` [B, W] int64, drafted with `confidences` [B, W] float32, as far as they are worth their rows."""
        counts, alive = self.length.cut(confidences, batch)
        return Drafts(tokens, counts, alive, confidences, passes)

    def observe(self, row: int, proposed: int, accepted: int, confidences: Sequence[float]) -> None:
        """`accepted` of its `proposed` drafts of a round were right."""
        self.length.observe(proposed, accepted, confidences)

    def attend_at(
        self, slots: torch.Tensor, given: PassInput, spans: Sequence[LayerSpan], *, extra: int, width: int
    ) -> Attend:
        """Attention of `width` rows of each request that first stores their k and v at `slots` [G * width] int64.

        The rows are the last of n + `extra` entries, of which each layer's rows see what its span says.
        """
        scale = self._shape.head_dim**-0.5

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.kv.write(layer, slots, k, v)
            return draft_attention(
                q,
                self.kv.k[layer],
                self.kv.v[layer],
                given.slot_table,
                given.rows,
                given.starts,
                extra=extra,
                width=width,
                causal=spans[layer].causal,
                window=spans[layer].window,
                scale=scale,
                longest=given.longest + extra,
            )

        return attend

"""What every neural arm shares: KV beside the target's slots, attention over it, drafts as long as they pay."""

from collections.abc import Sequence

import torch

from whiflash_sglang.cache.draft_kv import DraftKV
from whiflash_sglang.drafters.base import DraftBatch, Drafter, Drafts
from whiflash_sglang.drafters.length import DraftLength
from whiflash_sglang.models.layers import Attend, AttentionShape
from whiflash_sglang.platform.paged_attention import PagedAttentionPlan


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

    def attend_at(self, slots: torch.Tensor, plan: PagedAttentionPlan) -> Attend:
        """Attention that first stores k and v at `slots` [T] int64, then reads what `plan` lets each row see."""
        scale = self._shape.head_dim**-0.5

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.kv.write(layer, slots, k, v)
            return plan.run(q, self.kv.k[layer], self.kv.v[layer], scale)

        return attend

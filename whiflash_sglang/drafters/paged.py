"""What every neural arm shares: KV beside the target's slots, and attention over it."""

import torch

from whiflash_sglang.cache.draft_kv import DraftKV
from whiflash_sglang.drafters.base import Drafter
from whiflash_sglang.models.layers import Attend, AttentionShape
from whiflash_sglang.platform.paged_attention import PagedAttentionPlan


class PagedArm(Drafter):
    """Base of the arms that keep KV.

    Args:
        layers: draft layers with KV. shape: heads of each. dtype, device: the target's.
    """

    keeps_kv = True
    kv: DraftKV

    def __init__(self, layers: int, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        self._layers, self._shape, self._dtype, self._device = layers, shape, dtype, device

    def kv_bytes_per_token(self) -> int:
        """Bytes its KV adds to one target slot."""
        return DraftKV.bytes_per_token(self._layers, self._shape.kv_heads, self._shape.head_dim, self._dtype)

    def allocate(self, slots: int) -> None:
        """Allocate KV for `slots` target slots."""
        shape = self._shape
        self.kv = DraftKV(self._layers, slots, shape.kv_heads, shape.head_dim, self._dtype, self._device)

    def attend_at(self, slots: torch.Tensor, plan: PagedAttentionPlan) -> Attend:
        """Attention that first stores k and v at `slots` [T] int64, then reads what `plan` lets each row see."""
        scale = self._shape.head_dim**-0.5

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.kv.write(layer, slots, k, v)
            return plan.run(q, self.kv.k[layer], self.kv.v[layer], scale)

        return attend

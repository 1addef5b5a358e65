"""The autoregressive arm: an EAGLE-3 chain (arXiv 2503.01840, section 3)."""

import torch

from whiflash_sglang import arms
from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.cache.draft_kv import DraftKV
from whiflash_sglang.drafters.base import DraftBatch, Drafts
from whiflash_sglang.drafters.features import FeatureSlice
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.platform.paged_attention import PagedAttentionPlan


class Eagle3Arm:
    """Chain of `steps` drafts.

    Entry p pairs feature p with the embedding of token p+1, at slot and RoPE position p. A chain's first step
    runs the whole layer at position n-1; every later step feeds back the drafter's own pre-norm hidden state.

    Args:
        model: loaded checkpoint.
        captured: the union of layers that the target captures, in layer order.
        layers: the checkpoint's own, in the order of its `fc`.
    """

    arm = arms.AR
    keeps_kv = True

    def __init__(
        self, model: Eagle3Drafter, captured: tuple[int, ...], layers: tuple[int, ...], steps: int
    ) -> None:
        self.model = model
        self.captured_layers = layers
        self.max_drafts = steps
        self._features = FeatureSlice(captured, layers, model.config.target_hidden_size)
        self._scale = model.config.head_dim**-0.5

    def kv_bytes_per_token(self) -> int:
        c = self.model.config
        return DraftKV.bytes_per_token(c.num_layers, c.num_kv_heads, c.head_dim, self.model.dtype)

    def allocate(self, slots: int) -> None:
        c = self.model.config
        self.kv = DraftKV(
            c.num_layers, slots, c.num_kv_heads, c.head_dim, self.model.dtype, self.model.device
        )

    def catch_up(self, rows: FeatureRows) -> None:
        fused = self.model.fuse(self._features(rows.features))
        k, v = self.model.keys_values(rows.next_tokens, fused, rows.positions)
        self.kv.write(0, rows.slots, k, v)

    def draft(self, batch: DraftBatch) -> Drafts:
        steps = max(batch.limits, default=0)
        tokens = torch.empty((len(batch), steps), dtype=torch.int64, device=batch.bonus.device)
        table = batch.slot_table[batch.rows, : max(batch.lengths) + steps]
        slots = batch.slots(-1, steps)
        token, hidden = batch.bonus, self.model.fuse(self._features(batch.tail))
        for step in range(steps):
            plan = PagedAttentionPlan.build(
                table,
                [1] * len(batch),
                [n + step for n in batch.lengths],
                causal=True,
                dtype=hidden.dtype,
            )
            out = self.model(token, hidden, batch.starts + (step - 1), self._attend(plan, slots[:, step]))
            token = self.model.target_ids(self.model.logits(out.logits_hidden).argmax(-1))
            tokens[:, step] = token
            hidden = out.hidden
        return Drafts(tokens, [min(limit, steps) for limit in batch.limits])

    def release(self, row: int) -> None:
        """Nothing is kept per request: KV lives at the target's slots."""

    def _attend(self, plan: PagedAttentionPlan, slots: torch.Tensor):  # type: ignore[no-untyped-def]
        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.kv.write(layer, slots, k, v)
            return plan.run(q, self.kv.k[layer], self.kv.v[layer], self._scale)

        return attend

"""The diffusion arm: one DFlash block in one non-causal pass (arXiv 2602.06036)."""

import torch

from whiflash_sglang import arms
from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.cache.draft_kv import DraftKV
from whiflash_sglang.drafters.base import DraftBatch, Drafts
from whiflash_sglang.drafters.features import FeatureSlice
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.platform.paged_attention import PagedAttentionPlan


class DFlashArm:
    """One block: the bonus token at position n, then mask tokens, drafted together.

    Entry p comes from feature p alone, at position p; context enters only as K and V, shared by all layers.

    Args:
        model: loaded checkpoint. captured: the union of captured layers. block: tokens of a block, the bonus
            token included; at most the checkpoint's own block size (a drafter trained at 16 works at 8).
    """

    arm = arms.DIFFUSION
    keeps_kv = True

    def __init__(self, model: DFlashDrafter, captured: tuple[int, ...], block: int) -> None:
        self.model = model
        self.captured_layers = tuple(model.config.target_layer_ids)
        self.max_drafts = block - 1
        self._features = FeatureSlice(captured, self.captured_layers, model.config.target_hidden_size)
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
        k, v = self.model.keys_values(fused, rows.positions)
        self.kv.write_all(rows.slots, k, v)

    def draft(self, batch: DraftBatch) -> Drafts:
        block, size = self.max_drafts + 1, len(batch)
        ids = torch.full(
            (size, block), self.model.mask_token_id, dtype=torch.int64, device=batch.bonus.device
        )
        ids[:, 0] = batch.bonus
        positions = batch.starts[:, None] + torch.arange(block, device=ids.device)
        slots = batch.slots(0, block).reshape(-1)
        plan = PagedAttentionPlan.build(
            batch.slot_table,
            [block] * size,
            [n + block for n in batch.lengths],
            causal=False,
            dtype=self.model.dtype,
            request_rows=batch.rows,
        )

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.kv.write(layer, slots, k, v)
            return plan.run(q, self.kv.k[layer], self.kv.v[layer], self._scale)

        hidden = self.model(ids.view(-1), positions.view(-1), attend).view(size, block, -1)[:, 1:]
        wanted = max(batch.limits, default=0)
        logits = self.model.logits(hidden[:, :wanted].reshape(size * wanted, -1))
        return Drafts(logits.argmax(-1).view(size, wanted), [min(n, wanted) for n in batch.limits])

    def release(self, row: int) -> None:
        """Nothing is kept per request: KV lives at the target's slots."""

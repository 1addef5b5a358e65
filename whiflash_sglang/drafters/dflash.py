"""The diffusion arm: one DFlash block in one non-causal pass (arXiv 2602.06036)."""

import torch
import torch.nn.functional as F
from whiflash_kernels import dflash_catch_up

from whiflash_sglang import arms
from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.drafters.base import DraftBatch, Drafts
from whiflash_sglang.drafters.features import FeatureSlice
from whiflash_sglang.drafters.paged import PagedArm, choose
from whiflash_sglang.drafters.weights import dflash_weights, rope_table
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.platform.paged_attention import PagedAttentionPlan


class DFlashArm(PagedArm):
    """One block: the bonus token at position n, then mask tokens, drafted together.

    What is not expected to pay for its verification is cut off the block's end.

    Entry p comes from feature p alone, at position p; context enters only as K and V, shared by all layers.

    Args:
        model: loaded checkpoint. captured: the union of captured layers. layers: the checkpoint's own.
        block: tokens of a block, the bonus token included; at most the checkpoint's own block size.
        positions: rotary positions that may occur.
        vocabulary: [K] int64 target ids that it chooses from; None: all of them.
    """

    arm = arms.DIFFUSION

    def __init__(
        self,
        model: DFlashDrafter,
        captured: tuple[int, ...],
        layers: tuple[int, ...],
        block: int,
        positions: int,
        vocabulary: torch.Tensor | None = None,
    ) -> None:
        config = model.config
        weight = model.fc.weight
        super().__init__(config.num_layers, config.attention, weight.dtype, weight.device)
        self.model = model
        self._weights = dflash_weights(model)
        self._rope = rope_table(model.rotary, positions, weight.device)
        self.captured_layers = layers
        self.max_drafts = block - 1
        self._vocabulary = vocabulary
        self._head = model.target_lm_head if vocabulary is None else model.target_lm_head[vocabulary]
        self._features = FeatureSlice(captured, layers, model.fc.in_features // len(layers))

    def catch_up(self, rows: FeatureRows) -> None:
        features = self._features(rows.features)
        dflash_catch_up(features, rows.positions, rows.slots, self._weights, self._rope, self.kv.pools)

    def draft(self, batch: DraftBatch) -> Drafts:
        block, size = self.max_drafts + 1, len(batch)
        ids = batch.bonus.new_full((size, block), self.model.mask_token_id)
        ids[:, 0] = batch.bonus
        positions = batch.starts[:, None] + torch.arange(block, device=ids.device)
        plan = PagedAttentionPlan.build(
            batch.slot_table,
            [block] * size,
            [n + block for n in batch.lengths],
            causal=False,
            dtype=self._dtype,
            request_rows=batch.rows,
        )
        attend = self.attend_at(batch.slots(0, block).reshape(-1), plan)
        hidden = self.model(ids.view(-1), positions.view(-1), attend).view(size, block, -1)
        wanted = max(batch.limits)
        choice = choose(F.linear(hidden[:, 1 : wanted + 1].reshape(size * wanted, -1), self._head))
        token = choice.token if self._vocabulary is None else self._vocabulary[choice.token]
        return self.cut(token.view(size, wanted), choice.confidence.view(size, wanted), batch)

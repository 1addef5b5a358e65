"""The diffusion arm: one DFlash block in one non-causal pass (arXiv 2602.06036)."""

import torch
from whiflash_kernels import dflash_catch_up

from whiflash_sglang import arms
from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.drafters.base import DraftBatch, Drafts
from whiflash_sglang.drafters.features import FeatureSlice
from whiflash_sglang.drafters.paged import PagedArm
from whiflash_sglang.drafters.weights import dflash_weights, rope_table
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.dflash_config import LayerSpan
from whiflash_sglang.models.layers import Attend
from whiflash_sglang.platform.paged_attention import PagedAttentionPlan


class DFlashArm(PagedArm):
    """One block: the bonus token at position n, then mask tokens, drafted together.

    What is not expected to pay for its verification is cut off the block's end.

    Entry p comes from feature p alone, at position p; context enters only as K and V, shared by all layers.

    Args:
        model: loaded checkpoint. captured: the union of captured layers. layers: the checkpoint's own.
        block: tokens that a block verifies, the bonus token included; at most as many as the checkpoint drafts and it.
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
        self._weights = dflash_weights(model) if model.shared_context else None
        self._rope = rope_table(model.rotary, positions, weight.device)
        self.captured_layers = layers
        self.max_drafts = block - 1
        self._rows = self.max_drafts + (not config.from_anchor)
        self._spans = config.spans or (LayerSpan(),) * config.num_layers
        self._head = model.head if vocabulary is None else model.head.within(vocabulary)
        self._features = FeatureSlice(captured, layers, model.fc.in_features // len(layers))

    def catch_up(self, rows: FeatureRows) -> None:
        features = self._features(rows.features)
        if self._weights is not None:
            dflash_catch_up(features, rows.positions, rows.slots, self._weights, self._rope, self.kv.pools)
            return
        real = rows.slots >= 0  # the others are padding
        keys, values = self.model.keys_values(self.model.fuse(features[real]), rows.positions[real])
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            self.kv.write(layer, rows.slots[real], k, v)

    def draft(self, batch: DraftBatch) -> Drafts:
        block, size = self._rows, len(batch)
        ids = batch.bonus.new_full((size, block), self.model.mask_token_id)
        ids[:, 0] = batch.bonus
        positions = batch.starts[:, None] + torch.arange(block, device=ids.device)
        states = self.model(ids.view(-1), positions.view(-1), self._attend(batch))
        wanted = max(batch.limits)
        choice = self.model.propose(states.view(size, block, -1), batch.bonus, wanted, self._head)
        return self.cut(choice.token, choice.confidence, batch)

    def _attend(self, batch: DraftBatch) -> Attend:
        """Attention of one block a request: each layer sees what its span says."""
        block, size = self._rows, len(batch)
        slots = batch.slots(0, block).reshape(-1)
        attends = {}
        for span in set(self._spans):
            plan = PagedAttentionPlan.build(
                batch.slot_table,
                [block] * size,
                [n + block for n in batch.lengths],
                causal=span.causal,
                window=span.window,
                dtype=self._dtype,
                request_rows=batch.rows,
            )
            attends[span] = self.attend_at(slots, plan)
        if len(attends) == 1:
            return next(iter(attends.values()))
        return lambda layer, q, k, v: attends[self._spans[layer]](layer, q, k, v)

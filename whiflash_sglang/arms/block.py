"""The arm `diffusion`: DFlash drafts a block in one non-causal pass (arXiv 2602.06036)."""

import torch
from whiflash_kernels import dflash_catch_up, packed

from whiflash_sglang.arms.paged import PagedArm, dflash_weights
from whiflash_sglang.cache.backlog import FeatureRows, FeatureSlice
from whiflash_sglang.drafts import arms
from whiflash_sglang.formats.choice import Choice, Projection
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.dflash.dflash_config import LayerSpan
from whiflash_sglang.formats.packed import pack
from whiflash_sglang.records.core import DraftBatch


class DFlashArm(PagedArm):
    """Drafts a block together: the bonus token at position n, then mask tokens.

    Drafts at the block's end that are not expected to pay for their verification are cut off.

    Entry p comes from feature p alone, at position p; context enters only as K and V, shared by all layers.

    Args:
        model: loaded checkpoint. captured: all layers that the target captures. layers: those that the checkpoint
        reads. block: tokens that a block verifies, bonus token included; at most one more than the checkpoint drafts.
        positions: number of rotary positions that may occur.
        vocabulary: [K] int64 target ids from which it chooses; None: all of them.
    """

    arm = arms.DIFFUSION
    model: DFlashDrafter

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
        self._rope = model.rotary.tabulate(positions + config.block_size, weight.device)
        self.captured_layers = layers
        self.max_drafts = block - 1
        self._rows = config.rows(self.max_drafts)
        self._entries = 1 if config.anchored else self._rows
        self._spans = config.spans or (LayerSpan(),) * config.num_layers
        self._head = model.head if vocabulary is None else model.head.within(vocabulary)
        # The target's own head is packed with the target, and again when its weights are updated.
        parts = [part for part in (self._head.weight, self._head.matrix) if part is not model.target_lm_head]
        pack(part for part in parts if isinstance(part, torch.Tensor))
        if model.quantised:
            packed.quantise([self._head.weight, self._head.matrix])
        self.features = FeatureSlice(captured, layers, model.fc.in_features // len(layers))

    def target_written(self) -> None:
        self.model.target_written()
        self._copy(self._head.weight, self.model.head.weight)
        self._copy(self._head.bias, self.model.head.bias)

    def _copy(self, held: torch.Tensor | Projection | None, whole: torch.Tensor | Projection | None) -> None:
        """Renew the head's `held` after `whole` was written: copy the rows of its smaller vocabulary, or requantise."""
        kept = self._head.kept
        if kept is not None and isinstance(held, torch.Tensor) and isinstance(whole, torch.Tensor):
            held.copy_(whole[kept])
            packed.follow(held)
        else:
            packed.requantise(held)

    def catch_up(self, rows: FeatureRows) -> None:
        dflash_catch_up(rows.features, rows.positions, rows.slots, self._weights, self._rope, self.kv.pools)

    def whole(self, batch: DraftBatch, wanted: int) -> Choice:
        rows, entries, size = self._rows, self._entries, len(batch)
        positions, slots, ids = batch.rows_from(0, entries, fill=self.model.config.mask_token_id)
        assert ids is not None
        attend = self.attend_at(slots.view(-1), batch, self._spans, extra=entries, width=rows)
        states = self.model(ids.view(size, entries), positions.view(size, entries), attend)
        return self.model.propose(states, batch.bonus, wanted, self._head)

    def logits_at_once(self, requests: int) -> int:
        return requests * self.max_drafts * len(self._head.weight) * self.model.logits_held

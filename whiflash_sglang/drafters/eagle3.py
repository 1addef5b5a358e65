"""The autoregressive arm: an EAGLE-3 chain (arXiv 2503.01840, section 3)."""

import torch
from whiflash_kernels import eagle3_catch_up

from whiflash_sglang import arms
from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.drafters.base import DraftBatch, Drafts
from whiflash_sglang.drafters.features import FeatureSlice
from whiflash_sglang.drafters.paged import PagedArm
from whiflash_sglang.drafters.weights import eagle3_weights, rope_table
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.choice import choose
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.platform.paged_attention import PagedAttentionPlan


class Eagle3Arm(PagedArm):
    """Chain of up to `steps` drafts; it ends where another pass is not expected to pay.

    Entry p pairs feature p with the embedding of token p+1, at slot and RoPE position p. A chain's first step
    runs the whole layer at position n-1; every later step feeds back the drafter's own pre-norm hidden state.

    Args:
        model: loaded checkpoint.
        captured: the union of layers that the target captures, in layer order.
        layers: the checkpoint's own, in the order of its `fc`.
        steps: drafts of a round at most.
        positions: rotary positions that may occur.

    Raises:
        CheckpointError: a drafter of several layers, whose KV-only pass would not be exact.
    """

    arm = arms.AR

    def __init__(
        self,
        model: Eagle3Drafter,
        captured: tuple[int, ...],
        layers: tuple[int, ...],
        steps: int,
        positions: int,
    ) -> None:
        config = model.config
        if not model.kv_only_exact:
            raise CheckpointError(
                f"this EAGLE-3 drafter has {config.num_layers} layers; lazy catch-up is exact for one layer only"
            )
        weight = model.fc.weight
        super().__init__(config.num_layers, config.attention, weight.dtype, weight.device)
        self.model = model
        self._weights = eagle3_weights(model)
        self._rope = rope_table(model.rotary, positions, weight.device)
        self.captured_layers = layers
        self.max_drafts = steps
        self._features = FeatureSlice(captured, layers, model.fc.in_features // len(layers))

    def catch_up(self, rows: FeatureRows) -> None:
        features = self._features(rows.features)
        eagle3_catch_up(
            features, rows.next_tokens, rows.positions, rows.slots, self._weights, self._rope, self.kv.pools
        )

    def draft(self, batch: DraftBatch) -> Drafts:
        steps, size = max(batch.limits), len(batch)
        table = batch.slot_table[batch.rows, : max(batch.lengths) + steps]
        slots = batch.slots(-1, steps)
        token, hidden = batch.bonus, self.model.fuse(self._features(batch.tail))
        tokens, confidences = [], []
        for step in range(steps):
            plan = PagedAttentionPlan.build(
                table, [1] * size, [n + step for n in batch.lengths], causal=True, dtype=hidden.dtype
            )
            attend = self.attend_at(slots[:, step], plan)
            out = self.model(token, hidden, batch.starts + (step - 1), attend)
            choice = choose(self.model.logits(out.logits_hidden))
            token, hidden = self.model.target_ids(choice.token), out.hidden
            tokens.append(token)
            confidences.append(choice.confidence)
            # Where reading would wait for the device, at every step, running them all costs less.
            if batch.host.exact and not self.length.goes_on(confidences, batch):
                break
        return self.cut(torch.stack(tokens, 1), torch.stack(confidences, 1), batch, passes=len(tokens))

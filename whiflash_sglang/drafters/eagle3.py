"""The autoregressive arm: an EAGLE-3 chain (arXiv 2503.01840, section 3)."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from whiflash_kernels import eagle3_catch_up

from whiflash_sglang import arms
from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.cache.features import FeatureSlice
from whiflash_sglang.drafters.base import DraftBatch, Drafts
from whiflash_sglang.drafters.paged import PagedArm, PassInput
from whiflash_sglang.drafters.weights import eagle3_weights, rope_table
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.choice import Choice
from whiflash_sglang.models.dflash_config import LayerSpan
from whiflash_sglang.models.eagle3 import Eagle3Drafter


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
        self.tail_width = model.fc.in_features
        self.features = FeatureSlice(captured, layers, model.fc.in_features // len(layers))

    def catch_up(self, rows: FeatureRows) -> None:
        features, tokens, weights = rows.features, rows.next_tokens, self._weights
        if not self.model.embeds_alone:
            # What the processes looked up together takes the matrix's place, a row a token.
            weights = replace(weights, embedding=self.model.embed(tokens))
            tokens = torch.arange(len(tokens), device=tokens.device)
        eagle3_catch_up(features, tokens, rows.positions, rows.slots, weights, self._rope, self.kv.pools)

    def chain(self, given: PassInput, steps: int) -> Iterator[Choice]:
        """The chain, step by step: of every request the target's id [G] and how sure the drafter is of it [G].

        Nothing is read on the host between steps; who may read stops before.
        """
        positions, slots, _ = given.rows_from(-1, steps)
        token, hidden = given.bonus, self.model.fuse(given.tail)
        for step in range(steps):
            attend = self.attend_at(slots[:, step], given, (LayerSpan(causal=True),), extra=step, width=1)
            out = self.model(token, hidden, positions[:, step], attend)
            choice = self.model.choose(out.logits_hidden)
            token, hidden = choice.token, out.hidden
            yield choice

    def whole(self, given: PassInput, wanted: int) -> Choice:
        tokens, confidences = zip(*self.chain(given, wanted), strict=True)
        return Choice(torch.stack(tokens, 1), torch.stack(confidences, 1))

    def logits_at_once(self, requests: int) -> int:
        return requests * self.model.draft_vocab_size

    def draft(self, batch: DraftBatch) -> Drafts:
        # Where reading would wait for the device, at every step, or all steps are one launch, running all costs less.
        if not batch.host.exact or self.captured_for(batch):
            choice = self.choices(batch)
            return self.cut(choice.token, choice.confidence, batch, passes=choice.token.shape[1])
        tokens, confidences = [], []
        for choice in self.chain(PassInput.of(batch), max(batch.limits)):
            tokens.append(choice.token)
            confidences.append(choice.confidence)
            if not self.length.goes_on(confidences, batch):
                break
        return self.cut(torch.stack(tokens, 1), torch.stack(confidences, 1), batch, passes=len(tokens))

"""The arm `ar`: a chain that drafts one token per step (EAGLE-3, arXiv 2503.01840, section 3)."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from whiflash_kernels import eagle3_catch_up, packed

from whiflash_sglang.arms.paged import PagedArm, eagle3_weights
from whiflash_sglang.cache.backlog import FeatureRows, FeatureSlice
from whiflash_sglang.drafts import arms
from whiflash_sglang.formats.choice import Choice
from whiflash_sglang.formats.dflash.dflash_config import LayerSpan
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.layers import AttentionShape
from whiflash_sglang.formats.mtp import MTPDrafter
from whiflash_sglang.records.core import DraftBatch

SHORTER = (2, 3)
"""Numbers of drafts to which a chain may be limited, beside the longest."""


class ChainArm(PagedArm):
    """Drafts a chain of up to `steps` tokens, whose length is chosen with the route.

    Entry p pairs feature p with the embedding of token p+1, at slot and RoPE position p. A chain's first step runs the
    whole model at position n-1; every later step feeds back the drafter's own hidden state.

    Args:
        model: loaded checkpoint. depth: number of its layers.
        shape: heads of a layer. weight: one of its matrices, for dtype and device.
        captured: all layers that the target captures, in layer order.
        layers: those that the checkpoint reads, in its order. width: columns of their outputs together.
        steps: largest number of drafts of a round.
    """

    arm = arms.AR

    def __init__(
        self,
        model: Eagle3Drafter | MTPDrafter,
        depth: int,
        shape: AttentionShape,
        weight: Tensor,
        captured: tuple[int, ...],
        layers: tuple[int, ...],
        width: int,
        steps: int,
    ) -> None:
        super().__init__(depth, shape, weight.dtype, weight.device)
        self._chain = model
        self._spans = (LayerSpan(causal=True),) * depth
        self.captured_layers = layers
        self.max_drafts = steps
        self.tail_width = width
        self.features = FeatureSlice(captured, layers, width // len(layers))

    @property
    def lengths(self) -> list[int]:
        return [*(steps for steps in SHORTER if steps < self.max_drafts), self.max_drafts]

    def chain(self, batch: DraftBatch, steps: int) -> Iterator[Choice]:
        """Yield the chain's steps: for every request the target's id [G] and the drafter's confidence in it [G]."""
        positions, slots, _ = batch.rows_from(-1, steps)
        token, hidden = batch.bonus, self._chain.fuse(batch.tail)
        by_step = positions.t().contiguous()
        for step in range(steps):
            attend = self.attend_at(slots[:, step], batch, self._spans, extra=step, width=1)
            hidden, logits_hidden = self._chain(token, hidden, by_step[step], attend)
            choice = self._chain.choose(logits_hidden)
            token = choice.token
            yield choice

    def whole(self, batch: DraftBatch, wanted: int) -> Choice:
        tokens, confidences = zip(*self.chain(batch, wanted), strict=True)
        return Choice(torch.stack(tokens, 1), torch.stack(confidences, 1))

    def logits_at_once(self, requests: int) -> int:
        return requests * self._chain.draft_vocab_size


class Eagle3Arm(ChainArm):
    """A chain whose features are the fused outputs of several layers of the target.

    A one-layer drafter ingests features by matrix products only. K and V of a higher layer depend on the outputs of the
    layers below, which therefore attend over the request's text.

    Args:
        model: loaded checkpoint. captured, layers, steps: as in `ChainArm`. positions: number of rotary positions.
    """

    model: Eagle3Drafter

    def __init__(
        self, model: Eagle3Drafter, captured: tuple[int, ...], layers: tuple[int, ...], steps: int, positions: int
    ) -> None:
        heads, fc, depth = model.config.attention, model.fc, model.config.num_layers
        super().__init__(model, depth, heads, fc.weight, captured, layers, fc.in_features, steps)
        self.model = model
        self.attends_text = depth > 1
        self._weights = None if self.attends_text else eagle3_weights(model)
        self._rope = model.rotary.tabulate(positions, fc.weight.device)
        if model.quantised:
            packed.quantise([model.head.weight])

    def target_written(self) -> None:
        packed.requantise(self.model.head.weight)

    def catch_up(self, rows: FeatureRows) -> None:
        features, tokens, weights = rows.features, rows.next_tokens, self._weights
        if weights is None:
            fused = self.model.fuse(features)
            embedded = rows.embedded(self.model.embed)
            k, v = self.model.keys_values(embedded, fused, rows.positions, self.attend_text(rows))
            # The host does not know which rows are padding, so these write to slot 0, which belongs to no request.
            self.kv.write(self.model.config.num_layers - 1, rows.slots.clamp(min=0), k, v)
            return
        if rows.images is not None or self.model.shared_embedding is not None:
            # Embeddings gathered from tensor-parallel ranks, or of images, replace the matrix, one row per token: the
            # number of a token's row replaces its id.
            weights = replace(weights, embedding=rows.embedded(self.model.embed))
            tokens = torch.arange(len(tokens), device=tokens.device)
        eagle3_catch_up(features, tokens, rows.positions, rows.slots, weights, self._rope, self.kv.pools)


class ParallelArm(Eagle3Arm):
    """P-EAGLE, which drafts all tokens in one pass (vLLM's `parallel_drafting`): rows after the first have a mask in
    place of token and feature. Arguments as in `Eagle3Arm`.
    """

    lengths = PagedArm.lengths

    def whole(self, batch: DraftBatch, wanted: int) -> Choice:
        config, mask = self.model.config, self.model.mask_hidden
        assert mask is not None
        positions, slots, ids = batch.rows_from(-1, wanted, fill=config.mask_token)
        assert ids is not None
        fused = self.model.fuse(torch.cat([batch.tail, mask[None]]))
        hidden = torch.cat([fused[:-1, None], fused[-1:].expand(len(batch), wanted - 1, -1)], 1)
        attend = self.attend_at(slots.view(-1), batch, self._spans, extra=wanted - 1, width=wanted)
        _, states = self.model(ids.view(-1), hidden.flatten(0, 1), positions.view(-1), attend)
        token, confidence = self.model.choose(states)
        return Choice(token.view(-1, wanted), confidence.view(-1, wanted))

    def logits_at_once(self, requests: int) -> int:
        return super().logits_at_once(requests) * self.max_drafts


class MTPArm(ChainArm):
    """A chain whose feature is the target's state after the final norm.

    Args:
        model: loaded from the target's files. captured, layers, steps: as in `ChainArm`. positions: number of rotary
            positions.
    """

    model: MTPDrafter

    def __init__(
        self, model: MTPDrafter, captured: tuple[int, ...], layers: tuple[int, ...], steps: int, positions: int
    ) -> None:
        config, weight = model.config, model.projection.weight
        super().__init__(model, 1, config.attention, weight, captured, layers, config.hidden_size, steps)
        self.model = model
        model.rotary.tabulate(positions, weight.device)

    def catch_up(self, rows: FeatureRows) -> None:
        k, v = self.model.keys_values(rows.embedded(self.model.embed), rows.features, rows.positions)
        # The host does not know which rows are padding, so these write to slot 0, which belongs to no request.
        self.kv.write(0, rows.slots.clamp(min=0), k, v)

    def captured_bytes(self, requests: int) -> int:
        return super().captured_bytes(requests) + self.model.peak_bytes(requests)

"""EAGLE-3 as the autoregressive arm (arXiv 2503.01840)."""

from dataclasses import replace

import torch
from whiflash_kernels import eagle3_catch_up

from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.drafters.chain import ChainArm
from whiflash_sglang.drafters.weights import eagle3_weights, rope_table
from whiflash_sglang.models.eagle3 import Eagle3Drafter


class Eagle3Arm(ChainArm):
    """A chain whose features are fused outputs of several layers of the target.

    One layer ingests by products alone. K and V of a layer above it come from what the layers below put out, so these
    attend over the request's text.

    Args:
        model: loaded checkpoint. captured, layers, steps: as of `ChainArm`. positions: rotary positions that may occur.
    """

    def __init__(
        self,
        model: Eagle3Drafter,
        captured: tuple[int, ...],
        layers: tuple[int, ...],
        steps: int,
        positions: int,
    ) -> None:
        heads, fc, depth = model.config.attention, model.fc, model.num_layers
        super().__init__(model, depth, heads, fc.weight, captured, layers, fc.in_features, steps)
        self.model = model
        self.attends_text = depth > 1
        self._weights = None if self.attends_text else eagle3_weights(model)
        self._rope = rope_table(model.rotary, positions, fc.weight.device)

    def catch_up(self, rows: FeatureRows) -> None:
        features, tokens, weights = rows.features, rows.next_tokens, self._weights
        if weights is None:
            fused = self.model.fuse(features)
            k, v = self.model.keys_values(tokens, fused, rows.positions, self.attend_text(rows))
            # Padding goes to slot 0, which is nobody's: which rows are padding is not for the host to know.
            self.kv.write(self.model.num_layers - 1, rows.slots.clamp(min=0), k, v)
            return
        if not self.model.embeds_alone:
            # What the processes looked up together takes the matrix's place, a row a token.
            weights = replace(weights, embedding=self.model.embed(tokens))
            tokens = torch.arange(len(tokens), device=tokens.device)
        eagle3_catch_up(features, tokens, rows.positions, rows.slots, weights, self._rope, self.kv.pools)

"""EAGLE-3 as the autoregressive arm (arXiv 2503.01840)."""

from dataclasses import replace

import torch
from whiflash_kernels import eagle3_catch_up

from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.drafters.chain import ChainArm
from whiflash_sglang.drafters.weights import eagle3_weights, rope_table
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.eagle3 import Eagle3Drafter


class Eagle3Arm(ChainArm):
    """A chain whose features are fused outputs of several layers.

    Args:
        model: loaded checkpoint. captured, layers, steps: as of `ChainArm`. positions: rotary positions that may occur.

    Raises:
        CheckpointError: a drafter of several layers, whose KV-only pass would not be exact.
    """

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
        super().__init__(model, config.attention, weight, captured, layers, model.fc.in_features, steps)
        self.model = model
        self._weights = eagle3_weights(model)
        self._rope = rope_table(model.rotary, positions, weight.device)

    def catch_up(self, rows: FeatureRows) -> None:
        features, tokens, weights = rows.features, rows.next_tokens, self._weights
        if not self.model.embeds_alone:
            # What the processes looked up together takes the matrix's place, a row a token.
            weights = replace(weights, embedding=self.model.embed(tokens))
            tokens = torch.arange(len(tokens), device=tokens.device)
        eagle3_catch_up(features, tokens, rows.positions, rows.slots, weights, self._rope, self.kv.pools)

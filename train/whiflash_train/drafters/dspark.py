"""Train DSpark (arXiv 2607.05147): DFlash's blocks, a Markov head that reads the text's tokens, a confidence head.

The loss of a draft is `cross_entropy` · CE + `distance` · L1 of the target's and the drafter's distributions +
`confidence` · BCE of the confidence head, as DeepSpec combines them; positions are weighted by a falling exponential.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.dflash.dflash_config import DFlashConfig
from whiflash_sglang.formats.dflash.dspark import DSparkConfig, DSparkDrafter
from whiflash_train.config import DSpark
from whiflash_train.drafters.batches import cross_entropy, first_choice
from whiflash_train.drafters.dflash import BlockTraining, Examples, weighted_mean
from whiflash_train.drafters.dflash import initialise as initialise_trunk
from whiflash_train.drafters.initialisation import check_start
from whiflash_train.origin import Origin, for_training


class DSparkTraining(BlockTraining):
    """Trains a DSpark drafter with the loss of the module's docstring."""

    drafter: DSparkDrafter

    def __init__(self, drafter: DSparkDrafter, settings: DSpark, **options: Any) -> None:
        """Set up the loss; `options` are further parameters of `BlockTraining`."""
        super().__init__(drafter, gamma=settings.gamma, **options)
        self.settings = settings

    def loss(self, examples: Examples) -> Tensor:
        """Compute the weighted sum of the loss's terms; see `BlockTraining.loss`."""
        settings, shape, targets = self.settings, examples.valid.shape, examples.labels.weights
        logits, weights = self.corrected(examples), self.position_weights * examples.counted
        distance = (logits.float().softmax(-1) - targets).abs().sum(-1).view(shape)
        loss = settings.cross_entropy * weighted_mean(cross_entropy(logits, targets).view(shape), weights)
        loss = loss + settings.distance * weighted_mean(distance, weights)
        self.metrics = {"acceptance_length": examples.acceptance_length(logits)}
        if self.drafter.config.confidence:
            # The chance that a draft is accepted: with sampling the overlap of both distributions, greedily 0 or 1.
            right = 1 - distance.detach() / 2
            if settings.confidence_of == "choice":
                right = first_choice(logits.detach(), examples.labels.ids).view(shape).float()
            guessed = self.drafter.confidence_logits(examples.rows, examples.before).float()
            errors = F.binary_cross_entropy_with_logits(guessed, right, reduction="none")
            error = weighted_mean(errors, weights)
            loss = loss + settings.confidence * error
            self.metrics["confidence_loss"] = error.item()
        return loss

    def corrected(self, examples: Examples) -> Tensor:
        """Compute the drafts' logits [A·D, K], with the Markov head's correction after the text's own tokens."""
        logits = examples.logits()
        if not self.drafter.config.markov_rank:
            return logits
        latents = self.drafter.latents(examples.rows, examples.before).flatten(0, 1)
        matrix = self.drafter.get_parameter("markov_head.markov_w2.weight")[examples.ids]
        return logits + F.linear(latents, matrix.to(latents.dtype))


def initialise(target: Origin, settings: DSpark) -> DSparkDrafter:
    """Make a drafter with a trunk from `dflash.initialise` and new heads."""
    from_anchor = settings.sample_from_anchor is not False
    trunk = initialise_trunk(target, settings, block_size=settings.block_size - from_anchor, section="dspark")
    return with_heads(trunk, settings, from_anchor)


def go_on_from(path: Path, target: Origin, settings: DSpark) -> DSparkDrafter:
    """Load a drafter from a DFlash checkpoint, with new heads that leave its drafts unchanged, or from a DSpark one.
    Raises the errors of `check_start`."""
    trunk = check_start(path, "dspark", settings, target.num_layers).load(**for_training(target))
    from_anchor = settings.sample_from_anchor
    return with_heads(trunk, settings, trunk.config.from_anchor if from_anchor is None else from_anchor)


def with_heads(trunk: DFlashDrafter, settings: DSpark, from_anchor: bool) -> DSparkDrafter:
    """Make a drafter with the trunk's weights and its heads, if it has them. In new heads W2 and the confidence head
    are 0, so that the drafts are the trunk's."""
    kept = {field.name: getattr(trunk.config, field.name) for field in fields(DFlashConfig)}
    with_markov = getattr(trunk.config, "confidence_with_markov", settings.markov_rank > 0)
    config = DSparkConfig(
        **kept | {"from_anchor": from_anchor, "block_size": settings.block_size - from_anchor},
        markov_rank=settings.markov_rank,
        markov_head=settings.markov_head if settings.markov_rank else "vanilla",
        confidence=settings.confidence_head,
        confidence_with_markov=settings.confidence_head and with_markov,
    )
    drafter = DSparkDrafter(config, trunk.target_embedding, trunk.target_lm_head)
    with torch.no_grad():
        for name, parameter in drafter.heads().items():
            if name == "markov_head.markov_w1.weight":
                nn.init.normal_(parameter, std=settings.markov_rank**-0.5)
            elif name.startswith(("markov_head.markov_w2.", "confidence_head.")):
                parameter.zero_()
    drafter.load_state_dict({**drafter.state_dict(), **trunk.state_dict()})
    return drafter

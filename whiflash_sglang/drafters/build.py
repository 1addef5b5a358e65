"""The arms that the settings ask for, and the router between them."""

from pathlib import Path

import torch

from whiflash_sglang.checkpoints import block_size_of, dflash_layers, eagle3_layers
from whiflash_sglang.compat.target import Target
from whiflash_sglang.config import NeuralRouter, Settings
from whiflash_sglang.drafters.base import Drafter
from whiflash_sglang.drafters.dflash import DFlashArm
from whiflash_sglang.drafters.eagle3 import Eagle3Arm
from whiflash_sglang.drafters.lookup import LookupArm
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.models.router import Layers, Router


def build_drafters(settings: Settings, target: Target) -> list[Drafter]:
    """Load both checkpoints, which were checked against the target when the arguments were read.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    layers = target.shape.num_layers
    for_eagle, for_dflash = eagle3_layers(settings.eagle3, layers), dflash_layers(settings.dflash, layers)
    captured = tuple(sorted(set(for_eagle) | set(for_dflash)))
    eagle = Eagle3Drafter.load(
        settings.eagle3,
        device=target.device,
        dtype=target.dtype,
        target_embedding=target.embedding,
        target_lm_head=target.lm_head,
    )
    dflash = DFlashDrafter.load(
        settings.dflash,
        device=target.device,
        dtype=target.dtype,
        target_embedding=target.embedding,
        target_lm_head=target.lm_head,
    )
    for model in (eagle, dflash):
        model.requires_grad_(False)
    block = block_size_of(settings.dflash, settings.block_size)
    shared = settings.dflash_vocabulary == "eagle3"
    vocabulary = (
        eagle.target_ids(torch.arange(eagle.draft_vocab_size, device=target.device)) if shared else None
    )
    positions = target.context_len + max(block, settings.eagle_steps)
    drafters: list[Drafter] = [
        Eagle3Arm(eagle, captured, for_eagle, settings.eagle_steps, positions),
        DFlashArm(dflash, captured, for_dflash, block, positions, vocabulary),
    ]
    if settings.lookup.enabled:
        drafters.append(LookupArm(settings.lookup))
    return drafters


def load_router(settings: NeuralRouter | None, target: Target) -> Layers | None:
    """The router's weights in fp32 on the target's device; None where the settings name no router.

    Raises:
        CheckpointError: the file is missing, damaged, does not fit the target, or does not say its sign.
    """
    if settings is None:
        return None
    router = Router.load(
        Path(settings.path),
        hidden_size=target.shape.hidden_size,
        device=target.device,
        dtype=torch.float32,
        delta_sign=settings.delta_sign,
    )
    return router.layers()

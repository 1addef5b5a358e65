"""The arms that the settings ask for, and the router between them."""

from pathlib import Path

import torch

from whiflash_sglang import arms
from whiflash_sglang.checkpoints import block_size_of, target_layers
from whiflash_sglang.compat.target import Target
from whiflash_sglang.config import NeuralRouter, Settings
from whiflash_sglang.drafters.base import Drafter
from whiflash_sglang.drafters.dflash import DFlashArm
from whiflash_sglang.drafters.eagle3 import Eagle3Arm
from whiflash_sglang.drafters.lookup import LookupArm
from whiflash_sglang.host_view import HostView
from whiflash_sglang.models.formats import read_draft
from whiflash_sglang.models.router import Layers, Router


def build_drafters(settings: Settings, target: Target) -> list[Drafter]:
    """Load both checkpoints, which were checked against the target when the arguments were read.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    eagle3, dflash = read_draft(settings.eagle3, arms.AR), read_draft(settings.dflash, arms.DIFFUSION)
    layers = [target_layers(draft, target.shape.num_layers) for draft in (eagle3, dflash)]
    captured = tuple(sorted(set(layers[0]) | set(layers[1])))
    chain, block_drafter = (
        draft.load(
            device=target.device,
            dtype=target.dtype,
            target_embedding=target.embedding,
            target_lm_head=target.lm_head,
        ).requires_grad_(False)
        for draft in (eagle3, dflash)
    )
    block = block_size_of(settings.dflash, settings.block_size)
    shared = settings.dflash_vocabulary == "eagle3"
    vocabulary = (
        chain.target_ids(torch.arange(chain.draft_vocab_size, device=target.device)) if shared else None
    )
    positions = target.context_len + max(block, settings.eagle_steps)
    drafters: list[Drafter] = [
        Eagle3Arm(chain, captured, layers[0], settings.eagle_steps, positions),
        DFlashArm(block_drafter, captured, layers[1], block, positions, vocabulary),
    ]
    if settings.lookup.enabled:
        drafters.append(LookupArm(settings.lookup, HostView.of(target.device)))
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

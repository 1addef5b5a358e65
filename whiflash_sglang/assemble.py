"""Turns settings into drafters, router and policy."""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from whiflash_sglang import arms
from whiflash_sglang.cache.tokens import TokenTable
from whiflash_sglang.checkpoints.fit import block_size_of, target_layers
from whiflash_sglang.checkpoints.hub import verify
from whiflash_sglang.checkpoints.manifest import NeuralRouter
from whiflash_sglang.compat.forward import graphs
from whiflash_sglang.compat.forward.sampling import simulated_acceptance
from whiflash_sglang.compat.forward.target import Target
from whiflash_sglang.compat.scheduler import memory
from whiflash_sglang.config import NO_ROUTER, Settings
from whiflash_sglang.core import SampleHook
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.device.transfers import HostView
from whiflash_sglang.drafters.base import Drafter, of_text, widest_of, with_kv
from whiflash_sglang.drafters.chain import ChainArm, Eagle3Arm, MTPArm
from whiflash_sglang.drafters.dflash import DFlashArm
from whiflash_sglang.drafters.lookup import LookupArm
from whiflash_sglang.drafters.structure import StructureArm
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.models.formats import read_draft
from whiflash_sglang.models.mtp import MTPDrafter
from whiflash_sglang.models.packed import pack_modules
from whiflash_sglang.models.router import Layers, Router
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.epilogue import GATE_BYTES, Epilogue
from whiflash_sglang.routing.neural import NeuralPolicy
from whiflash_sglang.routing.policies import AutoPolicy, EntropyPolicy, Pinned, Policy
from whiflash_sglang.spans.vocabulary import vocabulary_of


def build_drafters(settings: Settings, target: Target, ranks: Ranks) -> list[Drafter]:
    """Load the checkpoints, which were checked against the target when the arguments were read.

    What a grammar forces is asked before what may be copied: it is surer. Without a tokenizer there are no grammars,
    and text is copied as it stands.

    Raises:
        CheckpointError: a file is missing or damaged. ConfigError: it is not the one that its bundle was made with.
    """
    verify(settings.checksums)
    drafts = {arm: read_draft(path, arm) for arm, path in settings.drafters.items()}
    layers = {arm: target_layers(draft, target.shape.num_layers) for arm, draft in drafts.items()}
    captured = tuple(sorted({layer for own in layers.values() for layer in own}))
    models = {
        arm: draft.load(
            device=target.device,
            dtype=target.dtype,
            target_embedding=target.embedding,
            target_lm_head=target.lm_head,
            shared=target.shared,
        ).requires_grad_(False)
        for arm, draft in drafts.items()
    }
    for model in models.values():
        pack_modules(model)
    block = block_size_of(settings.dflash, settings.block_size) if settings.dflash else 0
    positions = target.context_len + max(block, settings.eagle_steps)
    drafters: list[Drafter] = []
    if arms.AR in models:
        steps = settings.eagle_steps
        drafters.append(chain_arm(models[arms.AR], captured, layers[arms.AR], steps, positions))
    if arms.DIFFUSION in models:
        vocabulary = None
        if settings.dflash_vocabulary == "eagle3":
            ids = torch.arange(models[arms.AR].draft_vocab_size, device=target.device)
            vocabulary = models[arms.AR].target_ids(ids)
        own = layers[arms.DIFFUSION]
        # A block starts from the target's embedding module, as SGLang's; EAGLE-3 norms rows of its matrix.
        models[arms.DIFFUSION].embedding_scale = target.embedding_scale
        drafters.append(DFlashArm(models[arms.DIFFUSION], captured, own, block, positions, vocabulary))
    host = HostView.of(target.device)
    words = vocabulary_of(target.tokenizer) if target.tokenizer is not None else None
    if settings.structure.enabled and words is not None:
        drafters.append(StructureArm(settings.structure, words))
    if settings.lookup.enabled:
        token_bytes = words.token_bytes if words is not None else ()
        drafters.append(LookupArm(settings.lookup, host, ranks.now, token_bytes, words))
    return drafters


def chain_arm(
    model: Eagle3Drafter | MTPDrafter,
    captured: tuple[int, ...],
    layers: tuple[int, ...],
    steps: int,
    positions: int,
) -> ChainArm:
    """The autoregressive arm of a loaded checkpoint; arguments as of `Eagle3Arm`."""
    if isinstance(model, MTPDrafter):
        return MTPArm(model, captured, layers, steps)
    return Eagle3Arm(model, captured, layers, steps, positions)


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


def reserve(drafters: Mapping[str, Drafter], sync: DraftSync, target: Target, requests: int) -> None:
    """Before the pools are sized: what the worker will allocate for up to so many requests."""
    widest, kv = widest_of(drafters) + 1, with_kv(drafters).values()
    parts = memory.for_requests(target, requests, widest, Epilogue.bytes_for(widest))
    parts["tables"] += GATE_BYTES
    parts["rings"] = sync.bytes_for(requests + 1)
    parts["drafters"] = sum(drafter.bytes_for(requests + 1) for drafter in of_text(drafters).values())
    if graphs.captures_passes(target.device):
        parts["drafters"] += sync.captured_bytes(requests)
        # Passes are captured into the same memory, one at a time.
        parts["drafters"] += max((drafter.captured_bytes(requests) for drafter in kv), default=0)
    per_token = sum(drafter.kv_bytes_per_token() for drafter in kv)
    memory.reserve(parts, per_token=per_token, requests=requests, widest=widest, device=target.device)


def build_policy(settings: Settings, *, heads: bool = False) -> Policy:
    """`heads`: whether the loaded router predicts acceptance lengths. Raises ConfigError where a router is missing."""
    match settings.router:
        case "auto":
            return AutoPolicy(heads=heads)
        case "entropy":
            return EntropyPolicy(settings.entropy.tau, settings.entropy.min_dwell)
        case "ar" | "diffusion" | "lookup" | "none":
            return Pinned(settings.router)
        case "random" | "copy-rule":
            policy: Policy = _lab("policies").POLICIES[settings.router]()
            return policy
        case "neural":
            if settings.neural is None:
                raise ConfigError(NO_ROUTER)
            return NeuralPolicy(settings.neural.threshold, settings.neural.min_dwell)


def build_hooks(
    settings: Settings, tokens: TokenTable, target: Target, ranks: Ranks, widest: int
) -> list[SampleHook]:
    """What replaces sampled tokens where a benchmark asks for it; none else. widest: most rows of a request."""
    hooks: list[SampleHook] = []
    if settings.force_recorded:
        rows, width = tokens.data.shape
        hooks.append(_lab("hooks").Forcing(rows, width, target.shape.vocab_size, target.device))
    if (simulated := simulated_acceptance(widest)) is not None:
        draw, real = simulated
        hooks.append(_lab("hooks").Pinned(partial(ranks.broadcast, draw), real=real))
    return hooks


def _lab(module: str) -> Any:
    """A module of what measures: serving names none of it, and imports it only where a measurement asks for it."""
    return import_module(f"whiflash_sglang.lab.{module}")

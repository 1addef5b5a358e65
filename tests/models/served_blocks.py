"""A block drafter served by the engine's arm: features caught up into paged KV, one draft of two requests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from published import HIDDEN, TARGET_LAYERS, VOCAB, target_tensors
from torch import Tensor

from whiflash_sglang.arms.block import DFlashArm
from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.checkpoints.fit import TargetShape, block_size_of, check_fit, target_layers
from whiflash_sglang.drafts import arms
from whiflash_sglang.formats.table import Draft, read_draft
from whiflash_sglang.records.core import DraftBatch

LENGTHS = (11, 6)
BONUS = (70, 41)
CONTEXT = 32
"""Positions of a request that have a slot."""


@dataclass
class Served:
    """A draft of both requests: `tokens` and `confidences` [B, D], the `states` [B, rows, H] behind them, the
    `context` KV that the catch-up wrote per request ([layers, T, Hkv, D] each), and the `features` that went in."""

    draft: Draft
    arm: DFlashArm
    features: list[Tensor]
    tokens: Tensor
    confidences: Tensor
    states: Tensor
    context: list[tuple[Tensor, Tensor]]


def load(path: Path, arm: str = arms.DIFFUSION) -> tuple[Draft, Any]:
    """The checkpoint as a worker loads it, fitted to the target of `published`."""
    draft = read_draft(path, arm)
    check_fit(draft, TargetShape(HIDDEN, TARGET_LAYERS, VOCAB))
    embedding, head = target_tensors()
    model = draft.load(device=torch.device("cpu"), dtype=torch.float32, target_embedding=embedding, target_lm_head=head)
    return draft, model.requires_grad_(False)


@torch.no_grad()
def serve(path: Path) -> Served:
    """Load, catch up and draft once."""
    draft, model = load(path)
    layers = target_layers(draft, TARGET_LAYERS)
    captured = tuple(sorted({*layers, 0}))  # another drafter's layer lies between
    arm = DFlashArm(model, captured, layers, block_size_of(path, None), 256)
    arm.allocate(len(LENGTHS) * CONTEXT)
    table = torch.randperm(len(LENGTHS) * CONTEXT, generator=torch.Generator().manual_seed(3)).view(-1, CONTEXT)
    table = table.to(torch.int32)
    features = [_features(row, length, captured) for row, length in enumerate(LENGTHS)]
    for row, length in enumerate(LENGTHS):
        following = torch.zeros(length, dtype=torch.int64)
        slots = table[row, :length].long()
        arm.catch_up(FeatureRows(features[row], torch.arange(length), slots, following).of(arm.features))
    context = [
        (arm.kv.k[:, table[row, :length].long()].clone(), arm.kv.v[:, table[row, :length].long()].clone())
        for row, length in enumerate(LENGTHS)
    ]
    of_drafter = [captured.index(layer) for layer in layers]
    own = [rows.view(len(rows), -1, HIDDEN)[:, of_drafter].flatten(1) for rows in features]
    seen: list[Tensor] = []
    propose = model.propose
    model.propose = lambda states, *rest: (seen.append(states.clone()), propose(states, *rest))[1]
    drafts = arm.draft(batch(arm, table, torch.zeros(len(LENGTHS), 0)))
    assert drafts.confidences is not None
    return Served(draft, arm, own, drafts.tokens, drafts.confidences, seen[0], context)


def _features(row: int, length: int, captured: tuple[int, ...]) -> Tensor:
    return torch.randn(length, len(captured) * HIDDEN, generator=torch.Generator().manual_seed(10 + row))


def batch(arm: Any, table: Tensor, tail: Tensor) -> DraftBatch:
    """Both requests, whose drafts are as long as they may be."""
    return DraftBatch(
        rows=torch.arange(len(LENGTHS)),
        row_ids=range(len(LENGTHS)),
        longest=max(LENGTHS),
        starts=torch.tensor(LENGTHS),
        bonus=torch.tensor(BONUS),
        tail=tail,
        slot_table=table,
        limits=[arm.max_drafts] * len(LENGTHS),
        caps=torch.full((len(LENGTHS),), arm.max_drafts),
        calibration=torch.tensor(arm.length.calibration()),
    )

"""A chain drafter served by the engine's arm: features caught up into paged KV, one chain of two requests."""

from pathlib import Path

import torch
from published import HIDDEN, TARGET_LAYERS, VOCAB
from served_blocks import BONUS, CONTEXT, LENGTHS, batch, load
from torch import Tensor

from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.checkpoints.fit import target_layers
from whiflash_sglang.drafts import arms
from whiflash_sglang.serve.assemble import chain_arm

STEPS = 5


@torch.no_grad()
def serve(path: Path) -> tuple[list[list[int]], list[Tensor], list[list[int]]]:
    """Drafts per request, and what they came from: features [n, F] of its layers, and the tokens 1…n."""
    draft, model = load(path, arms.AR)
    layers = target_layers(draft, TARGET_LAYERS)
    arm = chain_arm(model, layers, layers, STEPS, 256)
    arm.allocate(len(LENGTHS) * CONTEXT)
    generator = torch.Generator().manual_seed(4)
    table = torch.randperm(len(LENGTHS) * CONTEXT, generator=generator).view(-1, CONTEXT).to(torch.int32)
    features = [torch.randn(n, len(layers) * HIDDEN, generator=generator) for n in LENGTHS]
    tokens = [
        [*torch.randint(VOCAB, (n - 1,), generator=generator).tolist(), bonus]
        for n, bonus in zip(LENGTHS, BONUS, strict=True)
    ]
    # Both requests together, as a prompt is prefilled, and what is left of them as rounds leave it: a row for itself.
    for parts, known in (([(0, n // 2) for n in LENGTHS], True), ([(n // 2, n - 1) for n in LENGTHS], False)):
        spans = list(zip(features, tokens, table, parts, strict=True))
        runs = [end - begin for begin, end in parts]
        requests = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(runs))
        arm.catch_up(
            FeatureRows(
                torch.cat([rows[begin:end] for rows, _, _, (begin, end) in spans]),
                torch.cat([torch.arange(*part) for part in parts]),
                torch.cat([slots[begin:end].long() for _, _, slots, (begin, end) in spans]),
                torch.cat([torch.tensor(ids[begin:end]) for _, ids, _, (begin, end) in spans]),
                requests,
                table,
                runs if known else None,
            )
        )
    drafts = arm.draft(batch(arm, table, torch.stack([rows[-1] for rows in features])))
    return drafts.tokens.tolist(), features, tokens

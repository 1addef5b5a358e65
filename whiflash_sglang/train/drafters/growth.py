"""An EAGLE-3 drafter goes on with a wider MLP and other draft tokens, drafting at first what it drafted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.models.target import TargetModel
from whiflash_sglang.train.config import Eagle3


def go_on_from(path: Path, target: TargetModel, settings: Eagle3, chosen: Tensor) -> Eagle3Drafter:
    """The drafter of a checkpoint, of the configured sizes.

    Args:
        chosen: [K] ascending ids, its draft vocabulary where the checkpoint has not as many.

    Raises:
        CheckpointError: it cannot be read. ConfigError: it reads other layers, has no head of its own, or a wider MLP.
    """
    drafter = Eagle3Drafter.load(
        path,
        device=torch.device("cpu"),
        dtype=torch.float32,
        target_embedding=target.embedding.float(),
        target_lm_head=target.head.float(),
    )
    found = drafter.config.layers_of(len(target.layers))
    if found != tuple(settings.target_layers):
        raise ConfigError(
            f"--start-from {path} has {found}, eagle3.target_layers asks for {tuple(settings.target_layers)}"
        )
    if drafter.lm_head is None:
        raise ConfigError(f"--start-from {path} has no head of its own")
    kept = drafter.target_ids(torch.arange(drafter.draft_vocab_size))
    ids = kept if len(kept) == len(chosen) else chosen
    return grown(drafter, target, ids, settings.intermediate_size or drafter.config.intermediate_size)


def grown(
    drafter: Eagle3Drafter, target: TargetModel, draft_ids: Tensor, intermediate_size: int
) -> Eagle3Drafter:
    """The same drafter over the tokens `draft_ids` [K], ascending, with an MLP of that width.

    What it had is kept. A new token's row is the target's; new units of the MLP add nothing until they are trained
    (Net2Net, arXiv 1511.05641). Raises `ConfigError` where the MLP would be narrower.
    """
    found = drafter.config
    if intermediate_size < found.intermediate_size:
        raise ConfigError(
            f"eagle3.intermediate_size {intermediate_size} is less than what it starts from has: "
            f"{found.intermediate_size}"
        )
    known = drafter.target_ids(torch.arange(drafter.draft_vocab_size))
    if intermediate_size == found.intermediate_size and torch.equal(known, draft_ids):
        return drafter
    config = replace(found, intermediate_size=intermediate_size, draft_vocab_size=len(draft_ids))
    result = Eagle3Drafter(config, drafter.target_embedding)
    parameters = dict(drafter.named_parameters())
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if parameter.shape == parameters[name].shape:
                parameter.copy_(parameters[name])
        for mine, theirs in zip(result.layers, drafter.layers, strict=True):
            _widen(mine, theirs)
        head = result.get_parameter("lm_head.weight")
        head.copy_(target.head[draft_ids])
        kept = torch.isin(draft_ids, known)
        head[kept] = parameters["lm_head.weight"][torch.searchsorted(known, draft_ids[kept])]
        result.d2t = draft_ids - torch.arange(len(draft_ids))
    return result


def _widen(mine: Any, theirs: Any) -> None:
    """Copy an MLP into one at least as wide."""
    old, new = theirs.mlp.down.in_features, mine.mlp.down.in_features
    nn.init.normal_(mine.mlp.gate_up.weight, std=0.02)
    mine.mlp.gate_up.weight[:old] = theirs.mlp.gate_up.weight[:old]
    mine.mlp.gate_up.weight[new : new + old] = theirs.mlp.gate_up.weight[old:]
    mine.mlp.down.weight.zero_()
    mine.mlp.down.weight[:, :old] = theirs.mlp.down.weight

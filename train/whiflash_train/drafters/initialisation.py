"""Initialise a drafter: the target's vocabulary, and copies of its layers or layers that add nothing at first."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whiflash_sglang.checkpoints.fit import target_layers
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats.checkpoint import IN_FILES
from whiflash_sglang.formats.dflash.dflash import MASK_EMBEDDING
from whiflash_sglang.formats.dflash.dflash_config import DFlashConfig
from whiflash_sglang.formats.dflash.dspark import DSparkConfig
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.table import Draft, read_draft
from whiflash_train.answers.store import FeatureStore, unique_answers
from whiflash_train.config import DFlash, DSpark, Eagle3, TrainConfig
from whiflash_train.origin import Origin, ServedOrigin, for_training
from whiflash_train.target import TargetModel, unknown

_NORM_ANSWERS = 64


def origin_of(config: TrainConfig, path: Path, stores: Sequence[FeatureStore]) -> Origin:
    """Return the target at `path` for new drafters: a `TargetModel` if this package knows its layers, else the tensors
    that SGLang wrote while it made the data of `stores`.

    Raises:
        ConfigError: `draft_layers` is set for a `TargetModel`. CheckpointError: SGLang wrote nothing yet.
    """
    sizes = config.draft_layers.model_dump(exclude_none=True)
    if unknown(path) is None:
        if sizes:
            raise ConfigError(
                f"draft_layers {sizes}: drafters for {path} have its own layers' sizes, which they may begin as; "
                "leave draft_layers out"
            )
        return TargetModel(path, device=torch.device("cpu"), dtype=torch.float32)
    return ServedOrigin.read(path, config.target, config.work / "target", sizes, norm_weight(stores), torch.float32)


def norm_weight(stores: Sequence[FeatureStore]) -> Tensor:
    """Estimate the initial weights of a drafter's last norm, for a target whose own norm is not known: [H] float32.

    If channels are alike before a norm, each channel's magnitude after it is its weight. So the estimate is each
    channel's root mean square in the target's final states. The weights' signs are unknown; training must find them.

    Raises:
        ValueError: there are no answers yet.
    """
    answers = unique_answers(stores)[:_NORM_ANSWERS]
    if not answers:
        raise ValueError("no training data: run `whiflash train --step data` first")
    states = torch.cat([store.read(record).final for store, record in answers])
    return states.float().square().mean(0).sqrt()


@torch.no_grad()
def blank(layer: Any) -> None:
    """Set a layer's output projections (attention, MLP) to 0, so that it adds nothing to the residual until trained."""
    for weight in (layer.attention.qkv.weight, layer.mlp.gate_up.weight):
        nn.init.normal_(weight, std=0.02)
    for weight in (layer.attention.out.weight, layer.mlp.down.weight):
        nn.init.zeros_(weight)


def source_layer(target: Origin, index: int, key: str) -> dict[str, Tensor]:
    """Return the weights of the target's layer `index`, by names of a drafter's parameters. Raises ConfigError naming
    the setting `key`."""
    if not target.layers:
        raise ConfigError(
            f"{key}: the target's layers are not of a drafter's kind, so a drafter cannot begin as one of them; "
            f"leave {key} out"
        )
    if not 0 <= index < len(target.layers):
        raise ConfigError(f"{key} {index}: the target has layers 0 to {len(target.layers) - 1}")
    state = target.layers[index].state_dict()
    return {
        f"{part}.{kind}": torch.cat([state[f"{name}.{kind}"] for name in names])
        for part, names in IN_FILES.items()
        for kind in ("weight", "bias")
        if f"{names[0]}.{kind}" in state and part != "embedding_norm"
    }


def check_start(path: Path, section: str, settings: Eagle3 | DFlash | DSpark, num_layers: int) -> Draft:
    """Check by its `config.json` that training can start from a checkpoint; returns its format.

    Args:
        section: name of `settings` in the configuration. num_layers: the target's.

    Raises:
        CheckpointError: it cannot be read, or does not fit the target. ConfigError: its shape is not the configured
            one, or the format in which checkpoints are written lacks a part of it.
    """
    arm = arms.AR if section == "eagle3" else arms.DIFFUSION
    draft = read_draft(path, arm)
    config = draft.config
    if section == "dspark" and type(config) is DFlashConfig:
        config = replace(config, from_anchor=False)  # which only DSpark's format holds
    lost = (section == "dflash" and type(config) is not DFlashConfig) or (path / MASK_EMBEDDING).is_file()
    try:
        lost = lost or read_draft(path, arm, config.to_json()).config != config
    except (ValueError, AttributeError):  # a variant, or the target's own head
        lost = True
    if lost:
        raise ConfigError(
            f"{path}: a {draft.format.name} checkpoint with settings of its own, such as windows, norms or a mask "
            f"embedding, cannot be trained on as {section}, whose format lacks them; start from another checkpoint"
        )
    layers = target_layers(draft, num_layers)
    asked: dict[str, tuple[Any, Any]] = {"target_layers": (tuple(settings.target_layers), layers)}
    if not isinstance(settings, Eagle3):
        asked["source_layers"] = settings.depth, config.num_layers
        asked["mask_token_id"] = settings.mask_token_id, config.mask_token_id
    elif config.num_layers != 1 or config.brings_embedding or config.draft_vocab_size is None:
        raise ConfigError(
            f"{path}: only EAGLE-3 drafters of one layer, with the target's embedding and an own head, can be trained"
        )
    if isinstance(settings, DSpark) and isinstance(config, DSparkConfig):
        asked |= {name: (getattr(settings, name), getattr(config, name)) for name in ("markov_rank", "markov_head")}
        asked["confidence_head"] = settings.confidence_head, config.confidence
    for key, (configured, has) in asked.items():
        if configured != has:
            raise ConfigError(f"the checkpoint {path} has {has}, {section}.{key} asks for {configured}")
    return draft


def go_on_from(path: Path, target: Origin, settings: Eagle3, frequencies: Tensor) -> Eagle3Drafter:
    """Load the drafter of a checkpoint and enlarge it to the configured sizes.

    Args:
        frequencies: [V] int64, counts of tokens in the data. If the configuration has more draft tokens than the
            checkpoint, the most frequent others are added; if fewer, the most frequent stay.

    Raises:
        CheckpointError, ConfigError: those of `check_start`; or its MLP is wider than the configured one.
    """
    drafter: Eagle3Drafter = check_start(path, "eagle3", settings, target.num_layers).load(**for_training(target))
    had = drafter.target_ids(torch.arange(drafter.draft_vocab_size))
    preferred = torch.zeros_like(frequencies)
    preferred[had] = frequencies.max() + 1
    ids = choose_draft_vocabulary(frequencies + preferred, settings.draft_vocab_size)
    return enlarged(drafter, target, ids, settings.intermediate_size or drafter.config.intermediate_size)


def choose_draft_vocabulary(frequencies: Tensor, size: int) -> Tensor:
    """Return the ids of the `size` most frequent tokens (ties: lower id first), ascending. frequencies: [V]."""
    order = torch.sort(frequencies, descending=True, stable=True).indices[:size]
    return order.sort().values


def enlarged(drafter: Eagle3Drafter, target: Origin, draft_ids: Tensor, intermediate_size: int) -> Eagle3Drafter:
    """Return the drafter with the draft vocabulary `draft_ids` [K], ascending, and an MLP of `intermediate_size` units.

    Head rows of earlier draft tokens stay. A new token's row is the target's plus the mean change that training made to
    the earlier rows. A softmax ignores an offset common to all its rows, so training lets it drift; rows without the
    offset would win or lose everywhere. New units of the MLP add nothing until they are trained (Net2Net, arXiv
    1511.05641). Raises `ConfigError` if the MLP would be narrower.
    """
    before = drafter.config
    if intermediate_size < before.intermediate_size:
        raise ConfigError(
            f"eagle3.intermediate_size {intermediate_size} is less than what it starts from has: "
            f"{before.intermediate_size}"
        )
    had = drafter.target_ids(torch.arange(drafter.draft_vocab_size))
    if intermediate_size == before.intermediate_size and torch.equal(had, draft_ids):
        return drafter
    config = replace(before, intermediate_size=intermediate_size, draft_vocab_size=len(draft_ids))
    result = Eagle3Drafter(config, drafter.target_embedding)
    parameters = dict(drafter.named_parameters())
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if parameter.shape == parameters[name].shape:
                parameter.copy_(parameters[name])
        for mine, theirs in zip(result.layers, drafter.layers, strict=True):
            _widen(mine, theirs)
        head = result.get_parameter("lm_head.weight")
        trained = parameters["lm_head.weight"]
        head.copy_(target.head[draft_ids] + (trained - target.head[had]).mean(0))
        kept = torch.isin(draft_ids, had)
        head[kept] = trained[torch.searchsorted(had, draft_ids[kept])]
        result.d2t = draft_ids - torch.arange(len(draft_ids))
    return result


def _widen(mine: Any, theirs: Any) -> None:
    """Copy the MLP of layer `theirs` into that of `mine`, which is at least as wide; further units output 0."""
    old, new = theirs.mlp.down.in_features, mine.mlp.down.in_features
    nn.init.normal_(mine.mlp.gate_up.weight, std=0.02)
    mine.mlp.gate_up.weight[:old] = theirs.mlp.gate_up.weight[:old]
    mine.mlp.gate_up.weight[new : new + old] = theirs.mlp.gate_up.weight[old:]
    mine.mlp.down.weight.zero_()
    mine.mlp.down.weight[:, :old] = theirs.mlp.down.weight

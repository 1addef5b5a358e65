"""Initialise a drafter: the target's vocabulary, and copies of its layers or layers that add nothing at first."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_train.answers.store import FeatureStore, unique_answers
from whiflash_train.config import Eagle3, TrainConfig
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


class SourceLayer(NamedTuple):
    """Weights of a target's layer, with q, k, v and gate, up joined as in a drafter's modules."""

    input_norm: Tensor
    qkv: Tensor
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


def source_layer(target: Origin, index: int, key: str) -> SourceLayer:
    """Return the weights of the target's layer `index`. Raises ConfigError naming the setting `key`."""
    if not target.layers:
        raise ConfigError(
            f"{key}: the target's layers are not of a drafter's kind, so a drafter cannot begin as one of them; "
            f"leave {key} out"
        )
    if not 0 <= index < len(target.layers):
        raise ConfigError(f"{key} {index}: the target has layers 0 to {len(target.layers) - 1}")
    layer = target.layers[index]
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    return SourceLayer(
        layer.input_layernorm.weight,
        torch.cat(qkv),
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        mlp.down_proj.weight,
    )


def go_on_from(path: Path, target: Origin, settings: Eagle3, frequencies: Tensor) -> Eagle3Drafter:
    """Load the drafter of a checkpoint and enlarge it to the configured sizes.

    Args:
        frequencies: [V] int64, counts of tokens in the data. If the configuration has more draft tokens than the
            checkpoint, the most frequent others are added; if fewer, the most frequent stay.

    Raises:
        CheckpointError: it cannot be read. ConfigError: it reads other target layers, or has several layers, a wider
            MLP, an embedding of its own or no head of its own.
    """
    drafter = Eagle3Drafter.load(path, **for_training(target))
    config = drafter.config
    layers, configured = config.layers_of(target.num_layers), tuple(settings.target_layers)
    if layers != configured:
        raise ConfigError(f"--start-from {path} has {layers}, eagle3.target_layers asks for {configured}")
    if config.num_layers != 1 or config.brings_embedding or drafter.lm_head is None:
        raise ConfigError(
            f"--start-from {path}: only an EAGLE-3 drafter of one layer, with the target's embedding and a head of its "
            "own, can be trained"
        )
    had = drafter.target_ids(torch.arange(drafter.draft_vocab_size))
    preferred = torch.zeros_like(frequencies)
    preferred[had] = frequencies.max() + 1
    ids = choose_draft_vocabulary(frequencies + preferred, settings.draft_vocab_size)
    return enlarged(drafter, target, ids, settings.intermediate_size or config.intermediate_size)


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

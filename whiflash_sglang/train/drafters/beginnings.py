"""How a drafter begins: with its target's vocabulary, and with layers of it, or with layers that add nothing yet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.models.origin import Origin, ServedOrigin
from whiflash_sglang.models.target import TargetModel, unknown
from whiflash_sglang.train.answers.store import FeatureStore, unique_answers
from whiflash_sglang.train.config import TrainConfig

_NORM_ANSWERS = 64


def origin_of(
    config: TrainConfig,
    path: Path,
    stores: Sequence[FeatureStore],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Origin:
    """The target at `path` as drafters begin from it: read whole where this package knows its layers, else what SGLang
    told while the data of `stores` were made.

    Raises:
        ConfigError: the configuration asks for what only one of the two has. CheckpointError: SGLang told nothing yet.
    """
    sizes = config.draft_layers.model_dump(exclude_none=True)
    if unknown(path) is None:
        if sizes:
            raise ConfigError(
                f"draft_layers {sizes}: drafters for {path} have its own layers' sizes, which they may begin as; "
                "leave draft_layers out"
            )
        return TargetModel(path, device=torch.device(device), dtype=dtype)
    origin = ServedOrigin.read(path, config.target, config.origin, sizes, norm_weight(stores), dtype)
    return origin.to(torch.device(device))


def norm_weight(stores: Sequence[FeatureStore]) -> Tensor:
    """What a drafter's last norm begins with, for a target whose own is not known: [H] float32.

    Behind a norm every channel has its weight for size, as far as channels are alike in front of it: so the root of the
    mean square of the target's final states, channel by channel. Their signs are lost, and are learned.

    Raises:
        ValueError: there are no answers yet.
    """
    answers = unique_answers(stores)[:_NORM_ANSWERS]
    if not answers:
        raise ValueError("no training data: run `whiflash train data` first")
    states = torch.cat([store.read(record).final for store, record in answers])
    return states.float().square().mean(0).sqrt()


@torch.no_grad()
def blank(layer: Any) -> None:
    """Let a layer add nothing to what goes through it until it is trained: attention and MLP end in 0."""
    for weight in (layer.attention.qkv.weight, layer.mlp.gate_up.weight):
        nn.init.normal_(weight, std=0.02)
    for weight in (layer.attention.out.weight, layer.mlp.down.weight):
        nn.init.zeros_(weight)


def source_layer(target: Origin, index: int, key: str) -> Any:
    """A layer of the target. Raises ConfigError naming `key` of the configuration where there is none to begin as."""
    if not target.layers:
        raise ConfigError(
            f"{key}: the target's layers are not of a drafter's kind, so a drafter cannot begin as one of them; "
            f"leave {key} out"
        )
    if not 0 <= index < len(target.layers):
        raise ConfigError(f"{key} {index}: the target has layers 0 to {len(target.layers) - 1}")
    return target.layers[index]

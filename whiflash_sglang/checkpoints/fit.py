"""Draft checkpoints against the target, from their configs alone, before anything is loaded or started."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whiflash_sglang import arms
from whiflash_sglang.checkpoints.hub import fetch, look_up
from whiflash_sglang.errors import CheckpointError, ConfigError
from whiflash_sglang.models.checkpoint import holds, integer, read_json_config
from whiflash_sglang.models.draft_format import merged
from whiflash_sglang.models.formats import Draft, read_draft


@dataclass(frozen=True, slots=True)
class TargetShape:
    """What a drafter must fit: the target's hidden size, layers and vocabulary."""

    hidden_size: int
    num_layers: int
    vocab_size: int

    @classmethod
    def of(cls, model_config: Any) -> "TargetShape":
        """From SGLang's configuration of a model."""
        text = model_config.hf_text_config
        return cls(text.hidden_size, text.num_hidden_layers, text.vocab_size)

    @classmethod
    def read(cls, path: Path) -> "TargetShape":
        """From a target's `config.json`. Raises CheckpointError naming the key that is missing."""
        config = read_json_config(path.parent)
        text = merged(path.parent, config, "text_config")
        keys = ("hidden_size", "num_hidden_layers", "vocab_size")
        return cls(*(integer(text, key, path.parent) for key in keys))


def block_size_of(checkpoint: Path, wanted: int | None) -> int:
    """Tokens that a block of the diffusion arm verifies, the bonus token included: `wanted`, or as many as its
    checkpoint drafts.

    Raises:
        CheckpointError: no usable block size, or `wanted` exceeds what the drafter was trained at.
    """
    trained = int(read_draft(checkpoint, arms.DIFFUSION).config.max_drafts) + 1
    if wanted is not None and wanted > trained:
        raise CheckpointError(
            f"--whiflash-block-size {wanted} exceeds the checkpoint's block of {trained}; "
            "a drafter works at shorter blocks than it was trained at, not at longer ones"
        )
    return wanted or trained


def target_layers(draft: Draft, num_layers: int) -> tuple[int, ...]:
    """Target layers whose outputs a drafter reads, in the order of its `fc`; `num_layers` stands for the state behind
    the final norm.

    Raises:
        CheckpointError: the target has no such layer, or SGLang cannot capture its output.
    """
    layers: tuple[int, ...] = draft.config.layers_of(num_layers)
    if draft.format.layers_key is None:
        return layers
    field = f"{draft.path}/config.json: {draft.format.layers_key}"
    wrong = [i for i in layers if not 0 <= i < num_layers]
    if wrong:
        raise CheckpointError(f"{field} names layers {wrong}; the target has layers 0 to {num_layers - 1}")
    if num_layers - 1 in layers:
        raise CheckpointError(
            f"{field} asks for the output of the last layer ({num_layers - 1}), which "
            "SGLang cannot capture for this target"
        )
    return layers


def check_drafters(drafters: Mapping[str, Path], target: TargetShape) -> None:
    """Raise CheckpointError where a drafter cannot belong to the target. drafters: arm → its checkpoint."""
    for arm, path in drafters.items():
        check_fit(read_draft(path, arm), target)


def read_layers(drafters: Mapping[str, Path], target: TargetShape) -> set[int]:
    """Layers of the target whose outputs drafters read, the state behind its final norm left out."""
    read = (target_layers(read_draft(path, arm), target.num_layers) for arm, path in drafters.items())
    return {layer for layers in read for layer in layers if layer < target.num_layers}


def check_fit(draft: Draft, target: TargetShape) -> None:
    """Raise CheckpointError where a drafter cannot belong to the target."""
    config, name = draft.config, draft.format.name
    hidden = config.target_hidden_size
    if hidden != target.hidden_size:
        raise CheckpointError(
            f"the {name} checkpoint {draft.path} is for a target of hidden size {hidden}, "
            f"this one has {target.hidden_size}"
        )
    if config.vocab_size != target.vocab_size:
        raise CheckpointError(
            f"the {name} checkpoint {draft.path} is for a vocabulary of {config.vocab_size}, "
            f"this target has {target.vocab_size}"
        )
    target_layers(draft, target.num_layers)


logger = logging.getLogger("whiflash_sglang")

_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Keys of `config.json` that say of how many layers a head is."""


def target_mtp(target: str, revision: str | None = None, download_dir: str | None = None) -> Path | None:
    """Where the head of a target can be read from: the target's own directory, as of any drafter.

    None where it has none, or one that is not served: then the log says why.

    Args:
        target: directory or hub id. download_dir: where downloads are kept.
    """
    try:
        config = look_up(f"{target}@{revision}" if revision else target).config
        if not _has_one(config.parent):
            return None
        head = read_draft(config.parent, arms.AR)
        path = fetch(target, revision=revision, download_dir=download_dir)
        if not holds(path, head.config.prefix):
            raise CheckpointError(f"{path} has no tensors {head.config.prefix}*")
    except CheckpointError as error:
        logger.warning("WHIFLASH: the target's own next-token head is not used: %s", error)
        return None
    except ConfigError:
        return None  # No target that we can read: SGLang says so, or knows better.
    return path


def _has_one(path: Path) -> bool:
    text = merged(path, read_json_config(path), "text_config")
    return any(text.get(key) for key in _COUNTS)

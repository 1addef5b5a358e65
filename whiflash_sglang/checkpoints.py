"""Draft checkpoints against the target, from their configs alone, before anything is loaded or started."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.checkpoint import read_json_config


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


def block_size_of(checkpoint: Path, wanted: int | None) -> int:
    """Tokens of a DFlash block: `wanted`, or the checkpoint's own.

    Raises:
        CheckpointError: no usable block size, or `wanted` exceeds what the drafter was trained at.
    """
    trained = read_json_config(checkpoint).get("block_size")
    if not isinstance(trained, int) or isinstance(trained, bool) or trained < 2:
        raise CheckpointError(
            f"{checkpoint}/config.json: block_size must be an integer of at least 2, got {trained!r}"
        )
    if wanted is not None and wanted > trained:
        raise CheckpointError(
            f"--whiflash-block-size {wanted} exceeds the checkpoint's block of {trained}; "
            "a drafter works at shorter blocks than it was trained at, not at longer ones"
        )
    return wanted or trained


def eagle3_layers(checkpoint: Path, num_layers: int) -> tuple[int, ...]:
    """Target layers whose outputs an EAGLE-3 checkpoint reads.

    SGLang's ids name the layer *before* which the state is captured; its default is [2, L//2, L-3], which are the
    outputs of [1, L//2-1, L-4]. An explicit list in the checkpoint already names outputs (SGLang adds one to each).
    """
    eagle = read_json_config(checkpoint).get("eagle_config") or {}
    listed = eagle.get("eagle_aux_hidden_state_layer_ids")
    layers = listed if listed else [1, num_layers // 2 - 1, num_layers - 4]
    return _checked_layers(layers, num_layers, checkpoint, "eagle_config.eagle_aux_hidden_state_layer_ids")


def dflash_layers(checkpoint: Path, num_layers: int) -> tuple[int, ...]:
    """Target layers whose outputs a DFlash checkpoint reads."""
    dflash = read_json_config(checkpoint).get("dflash_config") or {}
    layers = dflash.get("target_layer_ids")
    if not layers:
        raise CheckpointError(f"{checkpoint}/config.json: dflash_config.target_layer_ids is missing")
    return _checked_layers(layers, num_layers, checkpoint, "dflash_config.target_layer_ids")


def check_pair(eagle3: Path, dflash: Path, target: TargetShape) -> None:
    """Raise CheckpointError where a drafter cannot belong to the target."""
    for name, path in (("EAGLE-3", eagle3), ("DFlash", dflash)):
        config = read_json_config(path)
        hidden = config.get("target_hidden_size") or config.get("hidden_size")
        if hidden != target.hidden_size:
            raise CheckpointError(
                f"the {name} checkpoint {path} is for a target of hidden size {hidden}, "
                f"this one has {target.hidden_size}"
            )
        vocab = config.get("vocab_size")
        if vocab is not None and vocab != target.vocab_size:
            raise CheckpointError(
                f"the {name} checkpoint {path} is for a vocabulary of {vocab}, this target has {target.vocab_size}"
            )
    mask = (read_json_config(dflash).get("dflash_config") or {}).get("mask_token_id")
    if not isinstance(mask, int) or not 0 <= mask < target.vocab_size:
        raise CheckpointError(
            f"{dflash}/config.json: dflash_config.mask_token_id {mask!r} is not in the target's vocabulary "
            f"of {target.vocab_size}"
        )
    eagle3_layers(eagle3, target.num_layers)
    dflash_layers(dflash, target.num_layers)
    block_size_of(dflash, None)


def _checked_layers(layers: Any, num_layers: int, checkpoint: Path, field: str) -> tuple[int, ...]:
    if not isinstance(layers, list) or not all(isinstance(i, int) for i in layers):
        raise CheckpointError(
            f"{checkpoint}/config.json: {field} must be a list of layer numbers, got {layers!r}"
        )
    wrong = [i for i in layers if not 0 <= i < num_layers]
    if wrong:
        raise CheckpointError(
            f"{checkpoint}/config.json: {field} names layers {wrong}; the target has layers 0 to {num_layers - 1}"
        )
    if num_layers - 1 in layers:
        raise CheckpointError(
            f"{checkpoint}/config.json: {field} asks for the output of the last layer ({num_layers - 1}), which "
            "SGLang cannot capture for this target"
        )
    return tuple(layers)

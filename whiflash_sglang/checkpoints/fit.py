"""Judge draft checkpoints from `config.json` only: whether they fit the target, and what KV they need."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whiflash_sglang.checkpoints.bundle import Bundle, verify
from whiflash_sglang.checkpoints.hub import fetch, look_up
from whiflash_sglang.checkpoints.manifest import HUB, MANIFEST
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import CheckpointError, ConfigError, WhiflashError
from whiflash_sglang.formats.checkpoint import attention_shape, holds, integer
from whiflash_sglang.formats.config_json import layers_with_kv, read_json_config
from whiflash_sglang.formats.draft_format import merged
from whiflash_sglang.formats.table import Draft, read_draft
from whiflash_sglang.formats.uno import adapter_in, read_adapter


@dataclass(frozen=True, slots=True)
class TargetShape:
    """The shape that a drafter must fit: the target's hidden size, layers and vocabulary."""

    hidden_size: int
    num_layers: int
    vocab_size: int

    @classmethod
    def of(cls, model_config: Any) -> "TargetShape":
        """Read the shape from SGLang's `ModelConfig` of the target."""
        text = model_config.hf_text_config
        return cls(text.hidden_size, text.num_hidden_layers, text.vocab_size)

    @classmethod
    def read(cls, path: Path) -> "TargetShape":
        """Read the shape from a target's `config.json`. Raises CheckpointError naming the key that is missing."""
        text = merged(path.parent, read_json_config(path.parent), "text_config")
        keys = ("hidden_size", "num_hidden_layers", "vocab_size")
        return cls(*(integer(text, key, path.parent) for key in keys))


def block_size_of(checkpoint: Path, asked: int | None) -> int:
    """Return how many tokens a block of the diffusion arm verifies, the bonus token included: `asked`, or if that is
    None the largest number that the checkpoint allows.

    Raises:
        CheckpointError: no usable block size, or `asked` exceeds what the drafter was trained at.
    """
    trained = int(read_draft(checkpoint, arms.DIFFUSION).config.max_drafts) + 1
    if asked is not None and asked > trained:
        raise CheckpointError(
            f"--whiflash-block-size {asked} exceeds the checkpoint's block of {trained}; "
            "a drafter works at shorter blocks than it was trained at, not at longer ones"
        )
    return asked or trained


def target_layers(draft: Draft, num_layers: int) -> tuple[int, ...]:
    """Return the target layers whose outputs a drafter reads, in the order of its `fc` input. The id `num_layers` is
    the state after the final norm.

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
    """Raise CheckpointError if a drafter does not fit the target (`check_fit`). drafters: arm → its checkpoint."""
    for arm, path in drafters.items():
        check_fit(read_draft(path, arm), target)


def read_layers(drafters: Mapping[str, Path], target: TargetShape) -> set[int]:
    """Return the target layers whose outputs the drafters read, without the state after the final norm."""
    read = (target_layers(read_draft(path, arm), target.num_layers) for arm, path in drafters.items())
    return {layer for layers in read for layer in layers if layer < target.num_layers}


def check_fit(draft: Draft, target: TargetShape) -> None:
    """Raise CheckpointError if a drafter does not fit the target's hidden size, vocabulary or layers."""
    config, name = draft.config, draft.format.name
    if config.target_hidden_size != target.hidden_size:
        raise CheckpointError(
            f"the {name} checkpoint {draft.path} is for a target of hidden size {config.target_hidden_size}, "
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
"""Keys of `config.json` that give the number of layers of a target's own next-token head."""


def target_mtp(target: str, revision: str | None = None, download_dir: str | None = None) -> Path | None:
    """Return the directory that holds the target's own next-token head (MTP), which is the target's own directory.

    None if the target has no such head, or one that cannot be served: then the log says why.

    Args:
        target: directory or hub id. download_dir: where downloads are kept.
    """
    try:
        config = look_up(f"{target}@{revision}" if revision else target).config
        text = merged(config.parent, read_json_config(config.parent), "text_config")
        if not any(text.get(key) for key in _COUNTS):
            return None
        head = read_draft(config.parent, arms.AR)
        path = fetch(target, revision=revision, download_dir=download_dir)
        if not holds(path, head.config.prefix):
            raise CheckpointError(f"{path} has no tensors {head.config.prefix}*")
    except CheckpointError as error:
        logger.warning("WHIFLASH: the target's own next-token head is not used: %s", error)
        return None
    except ConfigError:
        return None  # SGLang reports a target that cannot be read, or finds it in another way.
    return path


TargetFit = tuple[TargetShape, int, int]
"""A target's sizes: the shape that drafters must fit, the bytes of one token's KV, and those of one KV number."""


def read_target(place: str) -> TargetFit:
    """Read a target's sizes from its directory or hub id. Raises WhiflashError naming what is missing."""
    config = look_up(place).config
    shape, text = TargetShape.read(config), merged(config.parent, read_json_config(config.parent), "text_config")
    element = 4 if str(text.get("dtype") or text.get("torch_dtype")) in ("float32", "float") else 2
    if text.get("kv_lora_rank"):  # MLA stores one latent vector and one rotated key per token
        numbers = sum(integer(text, key, config.parent) for key in ("kv_lora_rank", "qk_rope_head_dim"))
    else:
        _, kv_heads, head_dim = attention_shape(text, config.parent)
        numbers = 2 * kv_heads * head_dim
    return shape, layers_with_kv(text, shape.num_layers) * numbers * element, element


def judge(checkpoint: str, target: TargetFit | None) -> Iterator[tuple[str, bool, str]]:
    """Judge a drafter, or every drafter of a bundle, by directory or hub id; a UNO adapter by directory only.

    Yields its name, whether it can be served, and one line of details or the reason why not.
    """
    try:
        parts = _parts(checkpoint)
    except WhiflashError as error:
        yield checkpoint, False, str(error).removeprefix(f"{checkpoint}: ")  # the printed line names it already
        return
    for name, place in parts.items():
        try:
            if adapter := adapter_in(Path(os.path.expanduser(place))):
                yield name, True, f"an adapter of rank {read_adapter(adapter)['r']}, the uno arm"
            else:
                yield name, True, _describe(read_draft(look_up(place).config.parent), target)
        except WhiflashError as error:
            yield name, False, str(error).removeprefix(f"{place}: ")


def _parts(place: str) -> dict[str, str]:
    """Return drafter name → place: `place` itself, or a bundle's members after their SHA-256 was compared."""
    directory = Path(os.path.expanduser(place))
    if not (directory / MANIFEST).is_file():
        return {place: place}
    bundle = Bundle.load(directory)
    verify(bundle.checksums(bundle.parts))
    # The router is no drafter, and UNO's adapter is judged only where its files are.
    left = {"router", *(part for part in ("uno",) if bundle.parts.get(part, "").startswith(HUB))}
    return {f"{place}: {part}": bundle.place(part) for part in bundle.parts if part not in left}


def _describe(draft: Draft, target: TargetFit | None) -> str:
    config = draft.config
    element = target[2] if target else 2
    _, kv_heads, head_dim = config.attention
    kv = 2 * config.num_layers * kv_heads * head_dim * element
    parts = [f"{draft.format.name}, the {draft.format.arm} arm"]
    parts += [f"{drafts} drafts a block"] if (drafts := getattr(config, "max_drafts", None)) is not None else []
    share = ""
    if target is not None:
        shape, kv_bytes, _ = target
        check_fit(draft, shape)
        share = f", {kv / kv_bytes:.1%} of the target's"
        layers = ", ".join(str(layer) for layer in target_layers(draft, shape.num_layers))
        own = draft.format.layers_key is None
        parts.append("reads what the target's head reads" if own else f"reads the outputs of layers {layers}")
    parts.append(f"{kv} bytes of KV a token{share}")
    return "; ".join(parts)

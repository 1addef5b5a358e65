"""Draft checkpoints that cannot work: each error names the file and the thing that is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, edit, tiny_dflash, tiny_eagle3, tiny_target

from whiflash_sglang.checkpoints.fit import TargetShape, block_size_of, check_drafters, read_target
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.eagle3 import Eagle3Drafter

LAYERS, VOCAB = 6, 320
TARGET = TargetShape(HIDDEN, LAYERS, VOCAB)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """An EAGLE-3 and a DFlash checkpoint that fit `TARGET`."""
    target = tiny_target(tmp_path / "target")
    return tiny_eagle3(tmp_path / "eagle3", target), tiny_dflash(tmp_path / "dflash", target)


def load(pair: tuple[Path, Path]) -> None:
    """Load as a worker does at start: the configs against the target, then both sets of weights."""
    check_drafters(dict(zip(("ar", "diffusion"), pair, strict=True)), TARGET)
    options = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "target_embedding": torch.zeros(VOCAB, HIDDEN),
        "target_lm_head": torch.zeros(VOCAB, HIDDEN),
    }
    Eagle3Drafter.load(pair[0], **options)
    DFlashDrafter.load(pair[1], **options)


def refused(pair: tuple[Path, Path], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(pair)


def edit_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors")


def cut(checkpoint: Path, name: str, kept: float) -> None:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: int(kept * len(content))])


WEIGHTS, CONFIG, FC = "model.safetensors", "config.json", "fc.weight"
CUT = r"{}/model\.safetensors is damaged or truncated: .*; fetch it again"
FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: (path / WEIGHTS).unlink(), r"{} has no \.safetensors file"),
    (lambda path: cut(path, WEIGHTS, 0.0), CUT),
    (lambda path: cut(path, WEIGHTS, 0.3), CUT),
    (lambda path: cut(path, WEIGHTS, 0.999), CUT),
    (lambda path: (path / CONFIG).unlink(), r"{}/config\.json is missing"),
    (lambda path: cut(path, CONFIG, 0.5), r"{}/config\.json cannot be read"),
    (lambda path: edit_weights(path, lambda weights: weights.pop(FC)), r"{}: the weights lack fc\.weight"),
    (lambda path: edit(path, lambda config: config.update(hidden_size=96)), "of hidden size 96, this one has 64"),
    (lambda path: edit(path, lambda config: config.update(vocab_size=1000)), "of 1000, this target has 320"),
]


@pytest.mark.parametrize("which", [0, 1], ids=["eagle3", "dflash"])
@pytest.mark.parametrize(("spoil", "message"), FAULTS)
def test_files(pair: tuple[Path, Path], which: int, spoil: Callable[[Path], object], message: str) -> None:
    spoil(pair[which])
    refused(pair, message.format(pair[which]))


LAYER_FIELDS = {0: ("eagle_config", "eagle_aux_hidden_state_layer_ids"), 1: ("dflash_config", "target_layer_ids")}
SPELLED = {0: r"eagle_config\.eagle_aux_hidden_state_layer_ids", 1: "target_layer_ids"}
"""As messages name them: `target_layer_ids` may stand at the top level too."""


@pytest.mark.parametrize("which", LAYER_FIELDS, ids=["eagle3", "dflash"])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 2, 6], r"{field} names layers \[6\]; the target has layers 0 to 5"),
        ([-1, 2, 3], r"{field} names layers \[-1\]; the target has layers 0 to 5"),
        ([0, 2, 5], r"{field} asks for the output of the last layer \(5\)"),
        (["0", 1, 2], r"{field} must be a list of layer numbers, got \['0', 1, 2\]"),
    ],
)
def test_layers_that_the_target_has_not(pair: tuple[Path, Path], which: int, layers: list[Any], message: str) -> None:
    section, field = LAYER_FIELDS[which]
    edit(pair[which], lambda config: config[section].update({field: layers}))
    refused(pair, message.format(field=SPELLED[which]))


def test_a_draft_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    target = tiny_target(tmp_path / "target")
    eagle3 = tiny_eagle3(tmp_path / "eagle3", target, draft_vocab_size=128)
    pair = eagle3, tiny_dflash(tmp_path / "dflash", target)
    load(pair)
    for offset in (-1000, 1000):
        edit_weights(eagle3, lambda weights, by=offset: weights["d2t"].__setitem__(7, by))
        refused(pair, rf"{eagle3}: .*d2t.*{7 + offset}")
    edit_weights(eagle3, lambda weights: weights.update(d2t=torch.zeros(100, dtype=torch.int64)))
    refused(pair, r"d2t has \[100\] entries, draft_vocab_size is 128")
    edit_weights(eagle3, lambda weights: weights.pop("d2t"))
    refused(pair, "lack d2t")


@pytest.mark.parametrize("block", [0, 1, -4, "8", True])
def test_an_impossible_block(pair: tuple[Path, Path], block: Any) -> None:
    edit(pair[1], lambda config: config.update(block_size=block))
    refused(pair, rf"block_size must be an integer of at least 2, got {block!r}")


def test_a_block_longer_than_trained(pair: tuple[Path, Path]) -> None:
    assert block_size_of(pair[1], None) == 8
    assert block_size_of(pair[1], 4) == 4
    with pytest.raises(CheckpointError, match=r"--whiflash-block-size 16 exceeds the checkpoint's block of 8"):
        block_size_of(pair[1], 16)


@pytest.mark.parametrize("mask", [-1, 320, None, "mask"])
def test_an_impossible_mask_token(pair: tuple[Path, Path], mask: Any) -> None:
    edit(pair[1], lambda config: config["dflash_config"].update(mask_token_id=mask))
    refused(pair, r"mask_token_id .* is not in the target's vocabulary of 320")


def test_the_two_checkpoints_swapped(pair: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError):
        load((pair[1], pair[0]))


def test_recurrent_layers_of_a_target_have_no_kv(tmp_path: Path) -> None:
    target = tiny_target(tmp_path / "target")
    every = read_target(str(target))[1]
    edit(target, lambda config: config.update(full_attention_interval=3))
    assert read_target(str(target))[1] == every // 3

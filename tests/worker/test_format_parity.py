"""Variants of draft formats that SGLang loads, too: rounds accept what those of upstream's algorithms accept."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import sampled
from model_set import Models
from parity import compare
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, MASK_TOKEN, tiny_dflash, tiny_eagle3

NAMED = {"mask_token_id": MASK_TOKEN, "target_layer_ids": [0, 2, 3]}


def norms(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {f"fc_norm.{i}.weight": 0.5 + torch.rand(HIDDEN, generator=generator) for i in range(count)}


def upper_norms() -> dict[str, torch.Tensor]:
    """A second layer's: SGLang normalises by the first two and has no use for the third."""
    names = ("hidden_norm", "post_attention_layernorm", "input_layernorm")
    return {
        f"layers.1.{name}.weight": norm for name, norm in zip(names, norms(len(names)).values(), strict=True)
    }


CASES: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "other layers": ("diffusion", {"dflash_config": NAMED}, dict),
    "windows": (
        "diffusion",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "use_sliding_window": True,
            "sliding_window": 5,
        },
        dict,
    ),
    "two layers": ("ar", {"num_hidden_layers": 2}, upper_norms),
    "EAGLE 3.1": ("ar", {"fc_norm": True, "norm_output": True}, lambda: norms(3)),
}


@pytest.mark.parametrize("case", sampled(CASES, "EAGLE 3.1"))
def test_a_variant_accepts_what_upstream_accepts(models: Models, tmp_path: Path, case: str) -> None:
    arm, changes, more = CASES[case]
    eagle3 = partial(tiny_eagle3, num_layers=changes.get("num_hidden_layers", 1))
    make = eagle3 if arm == "ar" else tiny_dflash
    compare(models.target, arm, edited(make(tmp_path / "drafter", models.target), changes, more()))


def edited(checkpoint: Path, changes: dict[str, Any], more: dict[str, torch.Tensor]) -> Path:
    """The checkpoint with other keys in its configuration, and more tensors."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))
    weights = load_file(checkpoint / "model.safetensors")
    save_file(
        {name: value.clone() for name, value in (weights | more).items()}, checkpoint / "model.safetensors"
    )
    return checkpoint

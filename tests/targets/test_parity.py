"""Each arm accepts in every round what upstream's algorithm accepts: of other targets than dense ones, of targets with
a head of their own, and with variants of draft formats that SGLang loads, too.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_family
from matrix import sampled
from model_set import Models
from own_heads import HEADS, tiny_with_head
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


VARIANTS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, torch.Tensor]]]] = {
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


@pytest.mark.parametrize("case", sampled(VARIANTS, "EAGLE 3.1"))
def test_a_variant_of_a_format(models: Models, tmp_path: Path, case: str) -> None:
    arm, changes, more = VARIANTS[case]
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


@pytest.mark.parametrize(
    ("name", "arm"),
    sampled(
        [
            ("Gemma4ForCausalLM", "ar"),  # from rows of the embedding as they are
            ("Gemma4ForCausalLM", "diffusion"),  # from the scaled embedding
            ("GptOssForCausalLM", "diffusion"),
            ("Qwen3MoeForCausalLM", "ar"),
            ("DeepseekV3ForCausalLM", "diffusion"),
        ],
        ("Gemma4ForCausalLM", "ar"),
        ("Gemma4ForCausalLM", "diffusion"),
    ),
)
def test_a_family(name: str, arm: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    tiny_family(target, FAMILIES[name])
    make = tiny_eagle3 if arm == "ar" else tiny_dflash
    compare(target, arm, make(tmp_path / "drafter", target))


@pytest.mark.parametrize("name", sampled(HEADS, "mimo"))
def test_a_head_of_the_targets_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # SGLang's GLM-4.5 asks for it on a CPU, too
    tiny_with_head(tmp_path / "target", name)
    compare(tmp_path / "target", "ar", tmp_path / "target", speculative_algorithm="EAGLE")

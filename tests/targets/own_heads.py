"""Tiny random targets with next-token heads of their own, under the names of published files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, LAYERS, Family, HuggingFace, tiny_family
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN


@dataclass(frozen=True)
class OwnHead:
    """family: of the target, whose last layer's shapes the head's layer has. architecture: SGLang's class. prefix: of
    its tensors. norms: names of those that a decoder layer has not; projection: what joins embedding and state.
    """

    family: Family
    architecture: str
    prefix: str
    norms: tuple[str, ...]
    projection: str
    changes: Mapping[str, Any]


HEADS = {
    "mimo": OwnHead(
        FAMILIES["Qwen2ForCausalLM"],
        "MiMoForCausalLM",
        "model.mtp_layers.0.",
        ("token_layernorm", "hidden_layernorm", "final_layernorm"),
        "input_proj",
        {},
    ),
    "glm": OwnHead(
        FAMILIES["Glm4MoeForCausalLM"],
        "Glm4MoeForCausalLM",
        f"model.layers.{LAYERS}.",
        ("enorm", "hnorm", "shared_head.norm"),
        "eh_proj",
        # As GLM-4.5 of 355 billion parameters; the target's Hugging Face class has both, too.
        {"attention_bias": True, "use_qk_norm": True},
    ),
}


def tiny_with_head(directory: Path, name: str) -> HuggingFace:
    """Write a target with its head into `directory`; returns the target in Hugging Face's class."""
    head = HEADS[name]
    family = replace(head.family, changes={**head.family.changes, **head.changes})
    model = tiny_family(directory, family)
    weights = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(17)
    last = f"model.layers.{LAYERS - 1}."
    for tensor in [one for one in weights if one.startswith(last)]:
        like = weights[tensor]
        scale = like.shape[-1] ** -0.5 if like.ndim > 1 else 0.1
        drawn = torch.randn(like.shape, generator=generator) * scale
        name_here = head.prefix + tensor.removeprefix(last)
        weights[name_here] = 1 + drawn if tensor.endswith("norm.weight") else drawn
    for norm in head.norms:
        weights[f"{head.prefix}{norm}.weight"] = 1 + torch.randn(HIDDEN, generator=generator) * 0.1
    joined = torch.randn(HIDDEN, 2 * HIDDEN, generator=generator) * (2 * HIDDEN) ** -0.5
    weights[f"{head.prefix}{head.projection}.weight"] = joined
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    file = directory / "config.json"
    said = {"architectures": [head.architecture], "num_nextn_predict_layers": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    return model

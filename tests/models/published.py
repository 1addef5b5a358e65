"""Tiny random checkpoints with the tensor names and `config.json` keys of published draft formats.

Names, shapes and keys are facts of public files and of the code that defines a format (named at each); sizes are ours.
Norm weights are random too: a norm that is left out, or taken from another place, shows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.table import read_draft

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 64, 4, 2, 16, 96
VOCAB, TARGET_LAYERS, MASK = 320, 10, 7
Shapes = dict[str, tuple[int, ...]]

DIMENSIONS = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "dtype": "float32",
}
QWEN3: dict[str, Any] = {"model_type": "qwen3", "rope_theta": 10000.0, "rope_scaling": None} | DIMENSIONS


def decoder_layer(prefix: str, *, bias: bool = False, head_norms: bool = True, width: int = HIDDEN) -> Shapes:
    """A Qwen3 decoder layer; `width` is what the attention reads."""
    rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    shapes: Shapes = {f"{prefix}self_attn.{name}_proj.weight": (size, width) for name, size in rows.items()}
    shapes[f"{prefix}self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
    if bias:
        shapes |= {f"{prefix}self_attn.{name}_proj.bias": (size,) for name, size in rows.items()}
        shapes[f"{prefix}self_attn.o_proj.bias"] = (HIDDEN,)
    if head_norms:
        shapes |= {f"{prefix}self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
    return shapes | {
        f"{prefix}input_layernorm.weight": (HIDDEN,),
        f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
        f"{prefix}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{prefix}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{prefix}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }


def block_trunk(layers: int, features: int, *, bias: bool = False) -> Shapes:
    """z-lab/dflash, `dflash/model.py`: names of every `*-DFlash*` checkpoint."""
    shapes: Shapes = {
        "fc.weight": (HIDDEN, features * HIDDEN),
        "hidden_norm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
    }
    for index in range(layers):
        shapes |= decoder_layer(f"layers.{index}.", bias=bias)
    return shapes


def convolutions(layers: int, taps: int, group: int) -> Shapes:
    """SGLang 0.5.23, `DFlashGroupedConv`: what DFlash2's trunk adds around every sublayer."""
    shapes: Shapes = {}
    for index in range(layers):
        for name in ("attention_conv", "mlp_conv"):
            shapes[f"layers.{index}.{name}.base_kernel"] = (2, taps, HIDDEN)
            shapes[f"layers.{index}.{name}.kernel_projection.weight"] = (2 * taps * (HIDDEN // group), HIDDEN)
    return shapes


def draw(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors: matrices keep their input's variance, norms lie around one, biases and sinks around nought."""
    generator = torch.Generator().manual_seed(seed)

    def one(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) > 1:
            return torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        spread = torch.rand(shape, generator=generator) - 0.5
        return spread if name.endswith("bias") else 1 + spread

    return {name: one(name, shape) for name, shape in shapes.items()}


def write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, files: str = "one") -> Path:
    """A checkpoint directory. files: "one" or "sharded" `.safetensors`, or "bin" (what `torch.save` writes)."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(config)))
    if files == "bin":
        torch.save(dict(tensors), path / "pytorch_model.bin")
    elif files == "one":
        save_file(dict(tensors), path / "model.safetensors")
    else:
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, members in parts.items():
            save_file({name: tensors[name] for name in members}, path / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def refused(path: Path, config: Mapping[str, Any], message: str) -> None:
    """Such a configuration is refused by the name of its file, and for what `message` matches."""
    write(path, config, {})
    with pytest.raises(CheckpointError, match=rf"{path}/config\.json: {message}"):
        read_draft(path)


def target_tensors(seed: int = 99) -> tuple[Tensor, Tensor]:
    """The target's embedding and head, [V, H] each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCAB, HIDDEN, generator=generator), torch.randn(VOCAB, HIDDEN, generator=generator)

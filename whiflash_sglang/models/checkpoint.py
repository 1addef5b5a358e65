"""Draft checkpoints in SGLang's and Hugging Face's format: read and written, with errors that name the thing.

Checkpoints hold separate `q_proj`/`k_proj`/`v_proj` and `gate_proj`/`up_proj`; the modules hold them fused.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.layers import Attention, AttentionShape

WEIGHTS = "model.safetensors"


def read_json_config(path: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint directory. Raises `CheckpointError` where it is missing or damaged."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is damaged: it holds no object")
    return config


def read_config_of(path: Path, architecture: str) -> dict[str, Any]:
    """`config.json` of an `architecture` checkpoint. Raises `CheckpointError` where it is missing, damaged, or says
    another architecture.
    """
    config = read_json_config(path)
    if architecture not in (config.get("architectures") or []):
        raise CheckpointError(
            f"{path}/config.json: architectures is {config.get('architectures')}, expected [{architecture!r}]"
        )
    return config


def integer(
    config: Mapping[str, Any], key: str, path: Path, *, minimum: int = 1, default: int | None = None
) -> int:
    """An integer setting of at least `minimum`. Raises `CheckpointError` naming file and key otherwise."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise CheckpointError(
            f"{path}/config.json: {key} must be an integer of at least {minimum}, got {value!r}"
        )
    return value


def attention_shape(config: Mapping[str, Any], path: Path) -> AttentionShape:
    """Head counts. Raises `CheckpointError` where the key/value heads do not divide the heads."""
    heads = integer(config, "num_attention_heads", path)
    kv_heads = integer(config, "num_key_value_heads", path, default=heads)
    hidden = integer(config, "hidden_size", path)
    if heads % kv_heads:
        raise CheckpointError(
            f"{path}/config.json: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}"
        )
    return AttentionShape(heads, kv_heads, integer(config, "head_dim", path, default=hidden // heads))


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a directory. Raises `CheckpointError` where a file is damaged or there is none."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no .safetensors file; a draft checkpoint needs {WEIGHTS}")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(load_file(file))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged or truncated: {error}; fetch it again") from None
    return weights


class WeightReader:
    """Hands out a checkpoint's tensors by name, checking shapes."""

    def __init__(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        self._path, self._weights = path, weights

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def tensor(self, name: str) -> Tensor:
        """Raises `CheckpointError` where the checkpoint lacks `name`."""
        if name not in self._weights:
            raise CheckpointError(f"{self._path}: the weights lack {name}; the checkpoint is incomplete")
        return self._weights[name]

    def fill(self, parameter: Tensor, *names: str) -> None:
        """Copy the tensors `names`, stacked by rows, into `parameter`; `CheckpointError` on a misfit."""
        parts = [self.tensor(name) for name in names]
        try:
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
        except RuntimeError:
            value = parts[0]
        if value.shape != parameter.shape:
            found = ", ".join(f"{name} {list(part.shape)}" for name, part in zip(names, parts, strict=True))
            raise CheckpointError(
                f"{self._path}: {found} does not fit {list(parameter.shape)}, which config.json asks for "
                "(wrong hidden size, head count or number of captured layers)"
            )
        with torch.no_grad():
            parameter.copy_(value)

    def fill_attention(self, attention: Attention, prefix: str) -> None:
        """`<prefix>{q,k,v,o}_proj` and, where the module has them, `{q,k}_norm`."""
        self.fill(attention.qkv.weight, *(f"{prefix}{name}_proj.weight" for name in "qkv"))
        self.fill(attention.out.weight, f"{prefix}o_proj.weight")
        if attention.q_norm is not None and attention.k_norm is not None:
            self.fill(attention.q_norm.weight, f"{prefix}q_norm.weight")
            self.fill(attention.k_norm.weight, f"{prefix}k_norm.weight")


def attention_weights(attention: Attention, prefix: str) -> dict[str, Tensor]:
    """The inverse of `WeightReader.fill_attention`."""
    heads, kv_heads, head_dim = attention.shape
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    parts = torch.split(attention.qkv.weight, sizes)
    named = {f"{prefix}{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
    named[f"{prefix}o_proj.weight"] = attention.out.weight
    if attention.q_norm is not None and attention.k_norm is not None:
        named[f"{prefix}q_norm.weight"] = attention.q_norm.weight
        named[f"{prefix}k_norm.weight"] = attention.k_norm.weight
    return named


def write_checkpoint(
    path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write `config.json` and `model.safetensors`, each complete or not at all; floats in `dtype`."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach()
        .to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        .contiguous()
        .clone()
        for name, tensor in weights.items()
    }
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path) as scratch:
        save_file(tensors, Path(scratch) / WEIGHTS, metadata={"format": "pt"})
        (Path(scratch) / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
        for name in (WEIGHTS, "config.json"):
            staged = Path(scratch) / name
            staged.chmod(0o644)
            descriptor = os.open(staged, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            staged.replace(path / name)

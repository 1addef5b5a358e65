"""Draft checkpoints in SGLang's and Hugging Face's format: read and written, with errors that name the thing.

Checkpoints hold separate `q_proj`/`k_proj`/`v_proj` and `gate_proj`/`up_proj`; the modules hold them fused.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.files.jsonl import read_json_file
from whiflash_sglang.formats.layers import Attention, AttentionShape, SwiGLU

WEIGHTS = "model.safetensors"


def integer(
    config: Mapping[str, Any], key: str, path: Path, *, minimum: int = 1, default: int | None = None
) -> int:
    """An integer setting of at least `minimum`. Raises `CheckpointError` naming file and key otherwise."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise CheckpointError(
            f"{path}/config.json: {key} must be an integer of at least {minimum}, got {value!r:.200}"
        )
    return value


def number(config: Mapping[str, Any], key: str, path: Path, *, default: float | None = None) -> float:
    """A setting that is a number. Raises `CheckpointError` naming file and key otherwise."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{path}/config.json: {key} must be a number, got {value!r:.200}")
    return float(value)


def layer_ids(config: Mapping[str, Any], key: str, path: Path, section: str = "") -> tuple[int, ...]:
    """A setting that lists layers. Raises `CheckpointError` naming file, `section` and key otherwise."""
    layers = config.get(key)
    whole = isinstance(layers, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in layers)
    if not isinstance(layers, list) or not layers or not whole:
        raise CheckpointError(
            f"{path}/config.json: {section}{key} must be a list of layer numbers, got {layers!r:.200}"
        )
    return tuple(layers)


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


def read_weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a directory, one file or several: `.safetensors`, else `pytorch_model*.bin`, of which only tensors are
    unpickled. `prefix`: what their names begin with; others stay on the disk. Raises `CheckpointError` where a file is
    damaged or missing, or there is none.
    """
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(
            f"{path} has no .safetensors file and no pytorch_model.bin; a draft checkpoint needs {WEIGHTS}"
        )
    _check_shards(path, {file.name for file in files})
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(_read_file(file, prefix))
        except UnpicklingError:
            raise CheckpointError(
                f"{file} holds more than tensors, or is damaged, and is not unpickled; fetch it again or convert it to "
                ".safetensors"
            ) from None
        except (SafetensorError, OSError, ValueError, RuntimeError, EOFError) as error:
            raise CheckpointError(
                f"{file} is damaged or truncated: {_first_line(error)}; fetch it again"
            ) from None
    return weights


def holds(path: Path, prefix: str) -> bool:
    """Whether a `.safetensors` file of a directory has a tensor whose name begins with `prefix`.

    Raises `CheckpointError` where a file is damaged.
    """
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as handle:
                if any(name.startswith(prefix) for name in handle.keys()):  # noqa: SIM118
                    return True
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is damaged or truncated: {_first_line(error)}; fetch it again"
            ) from None
    return False


def _read_file(file: Path, prefix: str) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as handle:
            names = [name for name in handle.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name: handle.get_tensor(name) for name in names}
    found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UnpicklingError
    return {name: value for name, value in found.items() if name.startswith(prefix)}


def _check_shards(path: Path, found: set[str]) -> None:
    """Every file that an index names is there."""
    for index in (path / f"{WEIGHTS}.index.json", path / "pytorch_model.bin.index.json"):
        if not index.is_file() or not any(name.endswith(index.name.split(".")[1]) for name in found):
            continue
        try:
            named = set(read_json_file(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} cannot be read: {_first_line(error)}") from None
        if named - found:
            raise CheckpointError(f"{index} names {min(named - found)}, which is missing; fetch it again")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class Unfilled(TorchFunctionMode):
    """Modules that a thread makes inside have parameters of this dtype and of any numbers, for whoever fills them all:
    to draw a thousand million in float32 takes seconds, and four bytes each.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in (init.kaiming_uniform_, init.uniform_, init.normal_):
            return args[0] if args else named["tensor"]
        if func is torch.empty and named.get("dtype") is None:
            named["dtype"] = self._dtype
        return func(*args, **named)


class WeightReader:
    """Hands out a checkpoint's tensors by name, checking shapes."""

    def __init__(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        self._path, self._weights = path, weights

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def tensor(self, name: str) -> Tensor:
        """Raises `CheckpointError` where the checkpoint lacks `name`."""
        if name not in self._weights:
            raise CheckpointError(
                f"{self._path}: the weights lack {name}, so the checkpoint is incomplete: fetch it again"
            )
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

    def fill_mlp(self, mlp: SwiGLU, prefix: str) -> None:
        """`<prefix>{gate,up,down}_proj`."""
        self.fill(mlp.gate_up.weight, f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")
        self.fill(mlp.down.weight, f"{prefix}down_proj.weight")

    def fill_attention(self, attention: Attention, prefix: str) -> None:
        """`<prefix>{q,k,v,o}_proj` with their biases and `{q,k}_norm` where the module has them; also where a file
        holds one `qkv_proj`.
        """
        for kind, fused in (("weight", attention.qkv.weight), ("bias", attention.qkv.bias)):
            if fused is not None:
                whole = f"{prefix}qkv_proj.{kind}"
                parts = (f"{prefix}{name}_proj.{kind}" for name in "qkv")
                self.fill(fused, *((whole,) if whole in self else parts))
        self.fill(attention.out.weight, f"{prefix}o_proj.weight")
        if attention.out.bias is not None:
            self.fill(attention.out.bias, f"{prefix}o_proj.bias")
        if attention.q_norm is not None and attention.k_norm is not None:
            self.fill(attention.q_norm.weight, f"{prefix}q_norm.weight")
            self.fill(attention.k_norm.weight, f"{prefix}k_norm.weight")

    def reduced_head(self, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
        """A head over some of the target's ids: `lm_head` [rows, H] and those ids [rows] int64, from `d2t`'s offsets.

        Raises:
            CheckpointError: a tensor is missing, or does not fit the vocabulary of `vocab` ids.
        """
        head = self.tensor("lm_head.weight")
        if len(head) != rows:
            raise CheckpointError(
                f"{self._path}: lm_head.weight {list(head.shape)} does not fit draft_vocab_size {rows}"
            )
        return head, self.offsets("d2t", rows, vocab) + torch.arange(rows)

    def offsets(self, name: str, rows: int, vocab: int) -> Tensor:
        """[rows] int64, what is added to a row of the head for the target's id; zeros where the vocabularies are equal
        and the tensor is missing.

        Raises:
            CheckpointError: it is missing otherwise, has another size, or leads out of the vocabulary of `vocab` ids.
        """
        if name not in self:
            if rows == vocab:
                return torch.zeros(vocab, dtype=torch.int64)
            raise CheckpointError(
                f"{self._path}: the weights lack {name}, the map from the draft vocabulary to the target's"
            )
        offsets = self.tensor(name).to(torch.int64)
        if offsets.shape != (rows,):
            raise CheckpointError(
                f"{self._path}: {name} has {list(offsets.shape)} entries, draft_vocab_size is {rows}"
            )
        ids = offsets + torch.arange(rows)
        wrong = ids[(ids < 0) | (ids >= vocab)]
        if len(wrong):
            raise CheckpointError(
                f"{self._path}: {name} maps to token {int(wrong[0])}, outside the target's vocabulary of "
                f"{vocab} ({len(wrong)} such entries)"
            )
        return offsets


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


def mlp_weights(mlp: SwiGLU, prefix: str) -> dict[str, Tensor]:
    """The inverse of `WeightReader.fill_mlp`."""
    gate, up = mlp.gate_up.weight.chunk(2)
    return {
        f"{prefix}gate_proj.weight": gate,
        f"{prefix}up_proj.weight": up,
        f"{prefix}down_proj.weight": mlp.down.weight,
    }


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

"""Read and write draft checkpoints in SGLang's and Hugging Face's format, with errors that name file and key.

Checkpoints store `q_proj`, `k_proj`, `v_proj` and `gate_proj`, `up_proj` separately; the modules fuse each group.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.files.jsonl import read_json_file, staged
from whiflash_sglang.formats.config_json import misfit
from whiflash_sglang.formats.layers import AttentionShape, Rotary, rope_parameters

WEIGHTS = "model.safetensors"
QUANTISED = (("fp8", None), ("compressed-tensors", "float-quantized"))  # methods and formats that are read
MOST_LAYERS, MOST_ROWS, MOST_OF_A_HEAD = 1000, 256, 8192
"""Upper bounds of a drafter's layers or captured features, of a block's rows, and of a head's dimensions. No published
file comes near them; without them a damaged file could take minutes or all memory before its tensors are compared.
"""

IN_FILES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
    "embedding_norm": ("input_layernorm",),
    "input_norm": ("input_layernorm",),
    "mlp_norm": ("post_attention_layernorm",),
}
"""Parameter of a decoder layer → its tensors in files, stacked by rows. Parameters not listed keep their name."""


def integer(
    config: Mapping[str, Any],
    key: str,
    path: Path,
    *,
    minimum: int = 1,
    maximum: int = 2**31 - 1,
    default: int | None = None,
) -> int:
    """Return an integer setting from `minimum` to `maximum`. Raises `CheckpointError` naming file and key otherwise."""
    value = default if (found := config.get(key)) is None else found
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        bound = f"at most {maximum}" if type(value) is int and value > maximum else f"at least {minimum}"
        raise misfit(path, f"{key} must be an integer of {bound}, got {value!r:.200}")
    return value


def number(
    config: Mapping[str, Any], key: str, path: Path, *, default: float | None = None, most: float = 1e9
) -> float:
    """Return a setting above 0 and up to `most`. Raises `CheckpointError` naming file and key otherwise."""
    value = default if (found := config.get(key)) is None else found
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
        raise misfit(path, f"{key} must be a number above 0 and at most {most:g}, got {value!r:.200}")
    return float(value)


def layer_ids(config: Mapping[str, Any], key: str, path: Path, section: str = "") -> tuple[int, ...]:
    """Return a setting that lists layer numbers. Raises `CheckpointError` naming file, `section` and key otherwise."""
    layers = config.get(key)
    if not layers or not isinstance(layers, list) or {int} != set(map(type, layers)):
        raise misfit(path, f"{section}{key} must be a list of layer numbers, got {layers!r:.200}")
    return tuple(layers)


def attention_shape(config: Mapping[str, Any], path: Path) -> AttentionShape:
    """Return head counts and head size. Raises `CheckpointError` if the key/value heads do not divide the heads."""
    heads = integer(config, "num_attention_heads", path)
    kv_heads = integer(config, "num_key_value_heads", path, default=heads)
    hidden = integer(config, "hidden_size", path)
    if heads % kv_heads:
        raise misfit(path, f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    head_dim = integer(config, "head_dim", path, maximum=MOST_OF_A_HEAD, default=hidden // heads)
    return AttentionShape(heads, kv_heads, head_dim)


def _rope(config: Mapping[str, Any], path: Path, head_dim: int, positions: int) -> dict[str, Any]:
    """Return the rotary settings, after computing frequencies from them as a check. Raises `CheckpointError`."""
    try:
        parameters = rope_parameters(config)
        Rotary(parameters, head_dim, positions)
    except CheckpointError as error:
        raise misfit(path, str(error)) from None
    except Exception as error:  # transformers' functions raise errors of any kind for bad settings
        keys = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
        named = {key: config[key] for key in keys if config.get(key) is not None}
        why = f"{type(error).__name__}: {error!s:.100}"
        raise misfit(path, f"no angles follow from its rotary settings {named!r:.300} ({why})") from None
    return parameters


def trunk(config: Mapping[str, Any], path: Path, *, positions: int, eps: float) -> dict[str, Any]:
    """Return the configuration fields that all formats share; `positions` and `eps` are defaults for missing keys.

    Raises:
        CheckpointError: naming file and key of what does not fit.
    """
    method = config.get("quantization_config")
    if method and (method.get("quant_method"), method.get("format")) not in QUANTISED:
        raise misfit(path, f"quantization_config {method!r:.200} is not read; give a checkpoint in 16 bits")
    attention = attention_shape(config, path)
    most_positions = integer(config, "max_position_embeddings", path, default=positions)
    return {
        "hidden_size": integer(config, "hidden_size", path),
        "attention": attention,
        "vocab_size": integer(config, "vocab_size", path),
        "rope": _rope(config, path, attention.head_dim, most_positions),
        "max_position_embeddings": most_positions,
        "rms_norm_eps": number(config, "rms_norm_eps", path, default=eps, most=0.1),
    }


def trunk_json(config: Any) -> dict[str, Any]:
    """Return the `config.json` keys that all written drafters share, from a configuration (inverse of `trunk`)."""
    sizes = ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps")
    return {
        **{name: getattr(config, name) for name in sizes},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_attention_heads": config.attention.heads,
        "num_key_value_heads": config.attention.kv_heads,
        "head_dim": config.attention.head_dim,
        "num_hidden_layers": config.num_layers,
        "rope_theta": config.rope["rope_theta"],
        "rope_scaling": None if config.rope["rope_type"] == "default" else config.rope,
        "torch_dtype": "bfloat16",
    }


def check_target(path: Path, name: str, config: Any, width: int, embedding: Tensor, vocab: int) -> None:
    """Raise CheckpointError if a drafter of the format `name` does not fit its embedding matrix, whose rows must have
    `width` numbers, or has more than `vocab` ids.
    """
    if embedding.shape[1] != width:
        raise CheckpointError(
            f"{path}: this {name} drafter is for a target of hidden size {config.target_hidden_size}, "
            f"the embedding handed in has {embedding.shape[1]}"
        )
    if vocab < config.vocab_size:
        raise CheckpointError(f"{path}: vocab_size {config.vocab_size} exceeds the target's {vocab} tokens")


def read_weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a directory from one or several files: `.safetensors`, else `pytorch_model*.bin`, from which
    only tensors are unpickled. `prefix`: read only tensors whose names begin so. Raises `CheckpointError` if a
    file is damaged or missing, or there is none.
    """
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(
            f"{path} has no .safetensors file and no pytorch_model.bin; a draft checkpoint needs {WEIGHTS}"
        )
    _check_shards(path, {file.name for file in files})
    weights: dict[str, Tensor] = {}
    for file in files:
        with _undamaged(file):
            weights.update(_read_file(file, prefix))
    return weights


def holds(path: Path, prefix: str) -> bool:
    """Whether a `.safetensors` file of a directory has a tensor whose name begins with `prefix`.

    Raises `CheckpointError` where a file is damaged.
    """
    for file in sorted(path.glob("*.safetensors")):
        with _undamaged(file), safe_open(file, framework="pt") as handle:
            if any(name.startswith(prefix) for name in handle.keys()):  # noqa: SIM118
                return True
    return False


@contextmanager
def _undamaged(file: Path) -> Iterator[None]:
    """Raise `CheckpointError` if the code inside the `with` block cannot read `file`."""
    try:
        yield
    except UnpicklingError:
        raise CheckpointError(
            f"{file} holds more than tensors, or is damaged, and is not unpickled; fetch it again or convert it to "
            ".safetensors"
        ) from None
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file} is damaged or truncated: {_first_line(error)}; fetch it again") from None


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
    """Raise `CheckpointError` if an index of shards names a file that is not in `found`."""
    for index in (path / f"{WEIGHTS}.index.json", path / "pytorch_model.bin.index.json"):
        if not index.is_file() or not any(name.endswith(index.name.split(".")[1]) for name in found):
            continue
        try:
            named = set(read_json_file(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} cannot be read: {_first_line(error)}") from None
        if named - found:
            missing = min(map(str, named - found))
            raise CheckpointError(f"{index} names {missing:.200}, which is missing; fetch it again")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class Unfilled(TorchFunctionMode):
    """Makes modules with uninitialised parameters of one dtype, for a caller that fills them all: drawing a billion
    random numbers in float32 takes seconds, and four bytes each.

    `room` is the largest number of elements of all modules together, so a damaged `config.json` with huge sizes takes
    neither memory nor time. Raises `CheckpointError` beyond it, naming `path`.
    """

    def __init__(self, dtype: torch.dtype, path: Path, room: int) -> None:
        super().__init__()
        self._dtype, self._path, self._room = dtype, path, room

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in (init.kaiming_uniform_, init.uniform_, init.normal_):
            return args[0] if args else named["tensor"]
        if func in (torch.empty, torch.zeros, torch.ones):
            self._take(args)
        if func is torch.empty and named.get("dtype") is None:
            named["dtype"] = self._dtype
        return func(*args, **named)

    def _take(self, shape: Sequence[Any]) -> None:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        self._room -= math.prod(sizes)
        if self._room < 0:
            raise CheckpointError(
                f"{self._path}: config.json asks for a model far larger than the weights beside it (at a part of "
                f"{list(sizes)} numbers): they belong to different checkpoints, or one is damaged; fetch both again"
            )


class WeightReader:
    """Reads a checkpoint's tensors by name, and checks dtypes, shapes and that values are finite."""

    def __init__(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        self._path, self._weights = path, weights

    @classmethod
    def of(cls, path: Path, renamed: Mapping[str, str]) -> "WeightReader":
        """Read a directory; drops the prefix `model.` of names. renamed: another exporter's name → the usual name."""
        found = {name.removeprefix("model."): tensor for name, tensor in read_weights(path).items()}
        return cls(path, {renamed.get(name, name): tensor for name, tensor in found.items()})

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def modules(self, dtype: torch.dtype) -> Unfilled:
        """Return the mode for making the modules that these tensors fill, with a bound on the modules' size."""
        # The bound is generous, because a missing tensor or a wrong size has an error message of its own.
        return Unfilled(dtype, self._path, 2 * sum(map(Tensor.numel, self._weights.values())) + 2**20)

    def tensor(self, name: str, shape: tuple[int | None, ...] | None = None) -> Tensor:
        """Return a tensor of finite floating-point numbers, of `shape` if one is given, in which None is any size.

        Raises:
            CheckpointError: the checkpoint lacks it or the scales that it needs, or it holds other numbers.
        """
        found = self._floats(name)
        sizes = list(found.shape)
        if shape is not None and (
            len(shape) != len(sizes) or any(size not in (None, of) for size, of in zip(shape, sizes, strict=True))
        ):
            asked = ["any" if size is None else size for size in shape]
            raise self._wrong(f"{name} is {sizes}, config.json and the other tensors ask for {asked}")
        self._check_finite(found, name)
        return found

    def _stored(self, name: str) -> Tensor:
        if name not in self._weights:
            raise self._wrong(f"the weights lack {name}, so the checkpoint is incomplete: fetch it again")
        return self._weights[name]

    def _floats(self, name: str) -> Tensor:
        found, scale = self._stored(name), self._weights.get(f"{name}_scale")
        if found.is_floating_point() and found.dtype.itemsize > 1:
            return found
        scaled = scale is not None and found.dtype == torch.float8_e4m3fn and found.dim() == 2
        if not scaled or scale is None or scale.numel() not in (1, len(found)):
            kind = f"{found.dtype}, {list(found.shape)}"
            raise self._wrong(f"{name} is {kind}; give 16 bits, or a float8 matrix with its scales")
        factors = self._floats(f"{name}_scale").float().reshape(-1, 1)
        if not ((factors > 0) & factors.isfinite()).all():
            raise self._wrong(f"{name}_scale must hold finite numbers above 0, so the file is damaged: fetch it again")
        return found.float() * factors

    def _check_finite(self, value: Tensor, name: str) -> None:
        # One pass without a copy: a NaN makes both minimum and maximum NaN.
        if value.numel() and not torch.stack(value.detach().aminmax()).isfinite().all():
            raise self._wrong(
                f"{name} holds NaN or infinity as {value.dtype}, so no draft could be right: fetch it again, or serve "
                "it in bfloat16"
            )

    def fill(self, parameter: Tensor, *names: str) -> None:
        """Copy the tensors `names`, stacked by rows, into `parameter`. Raises `CheckpointError` if they do not fit."""
        parts = [self._floats(name) for name in names]
        try:
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
        except RuntimeError:
            value = parts[0]
        if value.shape != parameter.shape:
            found = ", ".join(f"{name} {list(part.shape)}" for name, part in zip(names, parts, strict=True))
            raise self._wrong(
                f"{found} does not fit {list(parameter.shape)}, which config.json asks for "
                "(wrong hidden size, head count or number of captured layers)"
            )
        with torch.no_grad():
            parameter.copy_(value)
        self._check_finite(parameter, ", ".join(names))

    def fill_drafter(
        self, drafter: nn.Module, names: Mapping[str, str], parts: Mapping[str, tuple[str, ...]] = IN_FILES
    ) -> None:
        """Fill every parameter of a drafter. names: parameter outside the layers → its name in files, if that differs.
        parts: the same for its layers, like `IN_FILES`. Raises `CheckpointError`.
        """
        for name, parameter in _outside_layers(drafter).items():
            self.fill(parameter, names.get(name, name))
        layers: Any = drafter.layers
        for index, layer in enumerate(layers):
            first = index == 0 and "midlayer.hidden_norm.weight" in self
            self.fill_layer(dict(layer.named_parameters()), "midlayer." if first else f"layers.{index}.", parts)

    def fill_layer(
        self, layer: Mapping[str, Tensor], prefix: str, names: Mapping[str, tuple[str, ...]] = IN_FILES
    ) -> None:
        """Fill a decoder layer's parameters, by name; queries, keys and values may also come from one `qkv_proj`."""
        for name, parameter in layer.items():
            part, kind, parts = _in_files(name, names)
            whole = f"{prefix}self_attn.qkv_proj.{kind}"
            if part == "attention.qkv" and whole in self:
                self.fill(parameter, whole)
            else:
                self.fill(parameter, *(f"{prefix}{each}.{kind}" for each in parts))

    def offsets(self, name: str, rows: int, vocab: int) -> Tensor:
        """Return [rows] int64: the target's id of a head row minus the row's number. Zeros if the tensor is missing and
        the vocabularies are equal.

        Raises:
            CheckpointError: it is missing otherwise, has another size, or leads out of the vocabulary of `vocab` ids.
        """
        if name not in self:
            if rows == vocab:
                return torch.zeros(vocab, dtype=torch.int64)
            raise self._wrong(f"the weights lack {name}, the map from the draft vocabulary to the target's")
        offsets = self._integers(name)
        if offsets.shape != (rows,):
            raise self._wrong(f"{name} has {list(offsets.shape)} entries, draft_vocab_size is {rows}")
        self._check_ids(name, offsets + torch.arange(rows), vocab)
        return offsets

    def ids(self, name: str, rows: int, vocab: int) -> Tensor:
        """Return the first `rows` of a list of token ids, sorted: [rows] int64, each one once.

        Raises:
            CheckpointError: it is missing or shorter, names a token twice or one outside a vocabulary of `vocab`.
        """
        listed = self._integers(name)
        if listed.dim() != 1 or len(listed) < rows:
            raise self._wrong(f"{name} is {list(listed.shape)}, draft_vocab_size is {rows}")
        ids = listed[:rows].sort().values
        self._check_ids(name, ids, vocab)
        if (ids[1:] == ids[:-1]).any():
            raise self._wrong(f"{name} names a token twice, so the file is damaged: fetch it again")
        return ids

    def _integers(self, name: str) -> Tensor:
        found = self._stored(name)
        if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
            raise self._wrong(f"{name} is {found.dtype}, integers are expected")
        return found.to(torch.int64)

    def _check_ids(self, name: str, ids: Tensor, vocab: int) -> None:
        wrong = ids[(ids < 0) | (ids >= vocab)]
        if len(wrong):
            raise self._wrong(
                f"{name} maps to token {int(wrong[0])}, outside the target's vocabulary of "
                f"{vocab} ({len(wrong)} such entries)"
            )

    def _wrong(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {text}")


def _in_files(name: str, names: Mapping[str, tuple[str, ...]]) -> tuple[str, str, tuple[str, ...]]:
    """Split a layer parameter's name: its module, its kind ("weight", "bias"), and the module's names in files."""
    part, _, kind = name.rpartition(".")
    return part, kind, names.get(part, (part.removeprefix("convolutions."),))


def _outside_layers(drafter: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in drafter.named_parameters() if not name.startswith("layers.")}


def drafter_weights(drafter: nn.Module, first: str = "layers.0.") -> dict[str, Tensor]:
    """Return a drafter's weights by their names in files. first: prefix of the first layer."""
    weights: dict[str, Tensor] = dict(_outside_layers(drafter))
    layers: Any = drafter.layers
    for index, layer in enumerate(layers):
        prefix = f"layers.{index}." if index else first
        heads, kv_heads, head_dim = layer.attention.shape
        for name, parameter in layer.named_parameters():
            part, kind, parts = _in_files(name, IN_FILES)
            sizes: Any = len(parameter) // len(parts)
            if part == "attention.qkv":
                sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
            split = zip(parts, parameter.split(sizes), strict=True)
            weights.update({f"{prefix}{each}.{kind}": rows for each, rows in split})
    return weights


def write_checkpoint(path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write `config.json` and `model.safetensors`, each complete or not at all; floats in `dtype`."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous().clone()
        for name, tensor in weights.items()
    }
    with staged(path / "config.json") as text, staged(path / WEIGHTS) as file:  # moves the weights first
        save_file(tensors, file, metadata={"format": "pt"})
        text.write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
        for each in (file, text):
            each.chmod(0o644)

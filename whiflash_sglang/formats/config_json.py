"""Read a checkpoint's `config.json` without importing the modules that build the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.files.jsonl import read_json_file


def misfit(path: Path, text: str) -> CheckpointError:
    """Return the error `text` about the `config.json` in the checkpoint directory `path`."""
    return CheckpointError(f"{path}/config.json: {text}")


def read_json_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    """Read `config.json`, or the file `name`, of a checkpoint directory. Raises `CheckpointError` if that fails."""
    file = path / name
    try:
        config = read_json_file(file, finite=False)
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing, which names a checkpoint's format: give the checkpoint's directory, or fetch it again"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{file} is damaged: a JSON object is expected, not {type(config).__name__}; fetch it again"
        )
    return config


def read_config_of(path: Path, architectures: tuple[str, ...]) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint of one of `architectures`. Raises `CheckpointError` if it is missing,
    damaged, or names another architecture."""
    config = read_json_config(path)
    if not set(architectures).intersection(config.get("architectures") or []):
        raise misfit(path, f"architectures is {config.get('architectures')}, expected {list(architectures)}")
    return config


def layers_with_kv(config: Mapping[str, Any], layers: int) -> int:
    """Return how many of a target's `layers` layers keep KV: also those with a window, but none that is recurrent."""
    kinds, every = config.get("layer_types"), config.get("full_attention_interval")
    if isinstance(kinds, list):
        return sum(kind not in ("linear_attention", "mamba", "conv", "moe") for kind in kinds) or layers
    return layers // every or layers if isinstance(every, int) and every > 0 else layers

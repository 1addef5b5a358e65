"""Write the records of a run beside its results.

`provenance.json` holds command, revision, versions, data, hardware and time. `run.json` holds the data, the
configuration and the starting point, which must be equal when a later run continues it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import sha256
from whiflash_sglang.files.jsonl import read_json, read_json_file, write_whole
from whiflash_sglang.files.provenance import made_by
from whiflash_train.answers.store import FeatureStore
from whiflash_train.config import TrainConfig

_PACKAGES = ("torch", "transformers", "xgrammar", "safetensors", "sglang", "whiflash-sglang")


def begun(config: TrainConfig, stores: Sequence[FeatureStore]) -> dict[str, Any]:
    """Return the part of `provenance.json` that is known when a run starts."""
    return {
        **made_by(_PACKAGES),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "config": config.model_dump(mode="json", exclude={"work", "chat_template"}),
        "data": [
            {"sequences": len(store.records), "index_sha256": hashlib.sha256(_index(store)).hexdigest()}
            for store in stores
        ],
    }


def _index(store: FeatureStore) -> bytes:
    """Return a shard's records as JSON: ids, lengths and offsets of its sequences, not their tokens."""
    return "".join(map(json.dumps, store.records)).encode()


RECORD = "run.json"


def check_same_run(directory: Path, facts: Mapping[str, Any], *, begun: bool) -> None:
    """Compare `facts` with those that the run in `directory` began with; a new run writes them instead.

    Args:
        facts: JSON values by name, possibly nested.
        begun: whether the directory holds a run to continue.

    Raises:
        ConfigError: naming the facts that have changed, with both values.
    """
    record = directory / RECORD
    now = _flat(read_json(json.dumps(facts)))
    if not begun:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(now, indent=1) + "\n")
        return
    if not record.exists():
        raise ConfigError(
            f"{directory} does not record the arguments of its run ({RECORD} is missing); remove it to start over"
        )
    before = read_json_file(record)
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        what = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed[:3])
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"{directory} holds a run with other arguments: {what}{more}. Repeat them, "
            "or remove that directory to start over"
        )


def data_digest(store: FeatureStore) -> str:
    """Return the SHA-256 of a shard's index and token ids, which determine its features."""
    tokens = bytes.fromhex(sha256(store.path / "tokens.bin"))
    return hashlib.sha256(_index(store) + tokens).hexdigest()


def checkpoint_digest(checkpoint: Path | None) -> str | None:
    """Return the SHA-256 of a checkpoint's configuration and weights; None if `checkpoint` is None."""
    if checkpoint is None:
        return None
    digest = hashlib.sha256()
    for path in sorted((*checkpoint.glob("*.safetensors"), checkpoint / "config.json")):
        digest.update(path.name.encode())
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def _flat(facts: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(facts, dict):
        return {prefix: facts}
    return {
        name: value
        for key, inner in facts.items()
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }

"""A run that goes on must be the run that began: its data, its configuration, and what it started from."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.jsonl import write_whole
from whiflash_sglang.train.answers.store import FeatureStore

RECORD = "run.json"


def check_same_run(directory: Path, facts: Mapping[str, Any], *, begun: bool) -> None:
    """Compare `facts` with those that the run in `directory` began with; keep them where it begins now.

    Args:
        facts: JSON values by name, nested as they like.
        begun: whether there is something to go on from.

    Raises:
        ConfigError: naming what has changed.
    """
    record = directory / RECORD
    now = _flat(json.loads(json.dumps(facts)))
    if not begun:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(now, indent=1) + "\n")
        return
    if not record.exists():
        raise ConfigError(
            f"{directory} does not say what its run began with ({RECORD} is missing); remove it to begin anew"
        )
    before = json.loads(record.read_text(encoding="utf-8"))
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        what = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed[:3])
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"{directory} holds a run that began otherwise: {what}{more}. Give it what it began with, "
            "or remove that directory to begin anew"
        )


def data_digest(store: FeatureStore) -> str:
    """SHA-256 of a shard's index and token ids; features follow from them."""
    digest = hashlib.sha256()
    for record in store.records:
        digest.update(json.dumps(record).encode())
    with (store.path / "tokens.bin").open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def checkpoint_digest(checkpoint: Path | None) -> str | None:
    """SHA-256 of a checkpoint's configuration and weights; None for none."""
    if checkpoint is None:
        return None
    digest = hashlib.sha256()
    for path in sorted((*checkpoint.glob("*.safetensors"), checkpoint / "config.json")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _flat(facts: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(facts, dict):
        return {prefix: facts}
    return {
        name: value
        for key, part in facts.items()
        for name, value in _flat(part, f"{prefix}.{key}" if prefix else key).items()
    }

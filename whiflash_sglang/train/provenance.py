"""What made an artefact: command, revision, versions, data, hardware and time, written beside it."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whiflash_sglang.provenance import made_by
from whiflash_sglang.train.answers.store import FeatureStore, SequenceRecord
from whiflash_sglang.train.config import TrainConfig

_PACKAGES = ("torch", "transformers", "xgrammar", "safetensors", "sglang", "whiflash-sglang")


@dataclass(frozen=True)
class Provenance:
    """A record begun when a run starts and written when it ends."""

    began: float
    record: dict[str, Any]

    @classmethod
    def start(cls, config: TrainConfig, stores: list[FeatureStore]) -> "Provenance":
        """Collect everything that is known at the start."""
        settings = config.model_dump(mode="json", exclude={"work", "chat_template"})
        return cls(
            time.time(),
            {
                **made_by(_PACKAGES),
                "threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
                "config": settings,
                "data": [_describe(store) for store in stores],
            },
        )

    def finish(self, directory: Path, results: dict[str, Any]) -> None:
        """Write `provenance.json` into `directory`."""
        record = {**self.record, "wall_seconds": round(time.time() - self.began, 1), **results}
        (directory / "provenance.json").write_text(json.dumps(record, indent=1) + "\n")


def trained_on(checkpoint: Path, store: FeatureStore) -> int:
    """How many of a shard's first sequences a checkpoint was trained on, by its `provenance.json`.

    All of them where the checkpoint has no such record.
    """
    file = checkpoint / "provenance.json"
    if not file.exists():
        return len(store.records)
    for shard in json.loads(file.read_text()).get("data", []):
        count = int(shard["sequences"])
        if count <= len(store.records) and digest_of(store.records[:count]) == shard["index_sha256"]:
            return count
    return 0


def _describe(store: FeatureStore) -> dict[str, Any]:
    """Size of a shard and a digest of the sequences that it names."""
    return {"sequences": len(store.records), "index_sha256": digest_of(store.records)}


def digest_of(records: Sequence[SequenceRecord]) -> str:
    """SHA-256 of an index: names data, not its content."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record).encode())
    return digest.hexdigest()

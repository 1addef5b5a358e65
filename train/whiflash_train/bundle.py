"""Bundles put together from trained parts."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from whiflash_sglang.checkpoints.bundles import digests, update_manifest
from whiflash_sglang.checkpoints.manifest import EMBEDDED_BUNDLE, MANIFEST
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.jsonl import read_json_file
from whiflash_train.config import TrainConfig


def assemble(config: TrainConfig, bundle: Path, name: str) -> Path:
    """Copy EAGLE-3 and the configured block drafter from the work directory; write `whiflash.json`.

    An existing bundle keeps what else its manifest says, its router and thresholds, too.

    Raises:
        ConfigError: a drafter has not been trained yet.
    """
    bundle.mkdir(parents=True, exist_ok=True)
    parts = {"eagle3": "eagle3", "dflash": config.block_drafter}
    vocabulary, sources = config.block.vocabulary, _sources(bundle)
    for key, name_of in parts.items():
        trained = config.work / name_of / "checkpoint"
        if not (trained / "config.json").is_file():
            raise ConfigError(f"{trained} holds no checkpoint: run `whiflash train --step {name_of}` first")
        replace_directory(trained, bundle / name_of)
        sources[key] = _source(bundle / name_of)
    target = f"embedded:{EMBEDDED_BUNDLE}" if config.target == "embedded" else config.target
    manifest: dict[str, Any] = {"schema_version": 1, "name": name, "target": target}
    manifest |= {**parts, "dflash_vocabulary": vocabulary, "sources": sources}
    if config.chat_template is not None:
        shutil.copyfile(config.chat_template, bundle / "chat_template.jinja")
        manifest["chat_template"] = "chat_template.jinja"
    update_manifest(bundle, manifest)
    return bundle


def _sources(bundle: Path) -> dict[str, Any]:
    """Sources of the bundle's parts in its manifest, if there is one."""
    path = bundle / MANIFEST
    return dict(read_json_file(path).get("sources", {})) if path.exists() else {}


def _source(directory: Path) -> dict[str, Any]:
    """The manifest's record of a part's files, against which they are checked when they are loaded."""
    return {"files": digests(sorted([*directory.glob("config.json"), *directory.glob("*.safetensors")]))}


def replace_directory(source: Path, place: Path) -> None:
    """Copy `source` to `place`, which is replaced by two renames once the copy is complete."""
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=place.parent) as scratch:
        copied, old = Path(scratch) / "new", Path(scratch) / "old"
        shutil.copytree(source, copied)
        if place.exists():
            place.rename(old)
        copied.rename(place)

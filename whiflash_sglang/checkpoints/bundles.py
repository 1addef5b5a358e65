"""Write a bundle from drafters' files. Imports no SGLang and no torch."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from whiflash_sglang.checkpoints.manifest import MANIFEST, load_manifest
from whiflash_sglang.files.disk import copy_member, sha256


def write_bundle(out: Path, facts: Mapping[str, Any], parts: Mapping[str, Iterable[Path]]) -> dict[str, Any]:
    """Copy files into the directory `out`, and write a manifest that lists them with their SHA-256.

    Args:
        facts: manifest key → value. parts: key of a part, which also names its directory → the part's files.

    Raises:
        ConfigError, CheckpointError: the manifest would not be valid, or `copy_member` refuses a file. OSError.
    """
    manifest: dict[str, Any] = {"schema_version": 1, **facts, "sources": dict(facts.get("sources", {}))}
    for key, files in parts.items():
        (out / key).mkdir()
        copies = [copy_member(file, out / key) for file in files]
        manifest.setdefault(key, key)
        manifest["sources"][key] = {"files": digests(copies)}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    load_manifest(out)
    return manifest


def digests(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by file name."""
    return {file.name: sha256(file) for file in files}

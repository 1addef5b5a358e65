"""Read and write a bundle: a directory with `whiflash.json`, its parts, and the SHA-256 of their files.

Imports no SGLang and no torch.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whiflash_sglang.checkpoints.hub import fetch
from whiflash_sglang.checkpoints.manifest import HUB, MANIFEST, Manifest, Source, load_manifest
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import copy_member, sha256


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk: its directory and its manifest."""

    directory: Path
    manifest: Manifest

    @classmethod
    def load(cls, directory: Path) -> "Bundle":
        """Read a bundle. Raises ConfigError as `load_manifest` does."""
        return cls(directory, load_manifest(directory))

    @property
    def parts(self) -> dict[str, str]:
        """Return the manifest's place of each part that it names, a path in the bundle or `hub:` and a hub id.

        The parts are the checkpoints `eagle3` and `dflash`, the adapter `uno` and the neural `router`.
        """
        said = self.manifest
        router = said.router.path if said.router else None
        places = {"eagle3": said.eagle3, "dflash": said.dflash, "uno": said.uno, "router": router}
        return {part: place for part, place in places.items() if place}

    def place(self, part: str) -> str:
        """Return the path of a part on this disk, or its hub id, with `@` and the revision that the manifest pins."""
        value, source = self.parts[part], self.manifest.sources.get(part, Source())
        if not value.startswith(HUB):
            return str(self.directory / value)
        return value.removeprefix(HUB) + (f"@{source.revision}" if source.revision else "")

    def fetch(self, part: str, download_dir: str | None = None) -> Path:
        """Return the local directory (or file) of a part; hub ids are downloaded.

        Raises:
            ConfigError: the hub gave nothing, or `config.json` is not the one that the manifest was made with.
        """
        place, source = self.place(part), self.manifest.sources.get(part, Source())
        if not self.parts[part].startswith(HUB):
            return Path(place)
        path = fetch(place.partition("@")[0], revision=source.revision, download_dir=download_dir)
        verify({str(path / name): digest for name, digest in source.files.items() if name == "config.json"})
        return path

    def checksums(self, parts: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 by file for those of `parts` that are inside the bundle and listed in its manifest."""
        sums: dict[str, str] = {}
        for part in parts:
            if not self.parts[part].startswith(HUB):
                place, files = Path(self.place(part)), self.manifest.sources.get(part, Source()).files
                directory = place if place.is_dir() else place.parent
                sums |= {str(directory / name): digest for name, digest in files.items()}
        return sums


def verify(files: Mapping[str, str]) -> None:
    """Compare files with their SHA-256. Raises ConfigError naming the first one that differs or is missing."""
    for name, digest in files.items():
        file = Path(name)
        if not file.is_file():
            raise ConfigError(f"{file} is missing, though its bundle's whiflash.json lists it: fetch the bundle again")
        if sha256(file) != digest:
            raise ConfigError(
                f"{file} is not the file that its bundle was made with (SHA-256 {digest}): damaged, or replaced; "
                "fetch the bundle again, or rebuild it with `whiflash bundle create`"
            )


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

"""Where the parts of a bundle are: beside its manifest, or on the hub at the revision that the manifest pins."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from whiflash_sglang.errors import ConfigError

if TYPE_CHECKING:
    from whiflash_sglang.config import Manifest

HUB = "hub:"
"""What a part's path begins with where the rest is a hub id."""


def member(bundle: Path, manifest: "Manifest", part: str, *, download_dir: str | None = None) -> Path:
    """The local directory (or file) of `part` ("eagle3", "dflash", "router"), fetched where it lies on the hub.

    Raises:
        ConfigError: the bundle has no such part, the hub gave nothing, or `config.json` is not the one that the
            manifest was made with.
    """
    from whiflash_sglang.hub import fetch

    named = {"eagle3": manifest.eagle3, "dflash": manifest.dflash}
    named["router"] = manifest.router.path if manifest.router else None
    value = named[part]
    if value is None:
        raise ConfigError(f"{bundle}/whiflash.json names no {part}")
    if not value.startswith(HUB):
        return bundle / value
    source = manifest.sources.get(part)
    revision = source.revision if source else None
    found = fetch(value.removeprefix(HUB), revision=revision, download_dir=download_dir)
    if source is not None:
        verify(
            found,
            {name: digest for name, digest in source.files.items() if name == "config.json"},
            bundle,
            part,
        )
    return found


def verify(directory: Path, files: dict[str, str], bundle: Path, part: str) -> None:
    """Compare files with their SHA-256. Raises ConfigError naming the first one that differs or is missing."""
    for name, digest in files.items():
        file = directory / name
        if not file.is_file():
            raise ConfigError(
                f"{bundle}/whiflash.json: sources.{part} names {name}, which {directory} has not"
            )
        if sha256(file) != digest:
            raise ConfigError(
                f"{file} is not the file that {bundle}/whiflash.json was made with (sources.{part}: SHA-256 {digest}); "
                "make the bundle anew with `whiflash bundle create`"
            )


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

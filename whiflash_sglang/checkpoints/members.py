"""Where the parts of a bundle are: beside its manifest, or on the hub at the revision that the manifest pins."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from whiflash_sglang.checkpoints.hub import fetch
from whiflash_sglang.checkpoints.manifest import HUB, Manifest
from whiflash_sglang.errors import ConfigError


def member(bundle: Path, manifest: Manifest, part: str, *, download_dir: str | None = None) -> Path:
    """The local directory (or file) of `part` ("eagle3", "dflash", "router"), fetched where it lies on the hub.

    Raises:
        ConfigError: the bundle has no such part, the hub gave nothing, or `config.json` is not the one that the
            manifest was made with.
    """
    value = parts_of(manifest)[part]
    if value is None:
        raise ConfigError(f"{bundle}/whiflash.json names no {part}")
    if not value.startswith(HUB):
        return bundle / value
    source = manifest.sources.get(part)
    revision = source.revision if source else None
    found = fetch(value.removeprefix(HUB), revision=revision, download_dir=download_dir)
    if source is not None and "config.json" in source.files:
        verify({str(found / "config.json"): source.files["config.json"]})
    return found


def parts_of(manifest: Manifest) -> dict[str, str | None]:
    """What the manifest says of where each part is."""
    router = manifest.router.path if manifest.router else None
    return {"eagle3": manifest.eagle3, "dflash": manifest.dflash, "router": router}


def checksums(bundle: Path, manifest: Manifest, served: Iterable[str]) -> dict[str, str]:
    """SHA-256 by file, of those of the parts `served` that lie in the bundle and whose files its manifest tells."""
    found: dict[str, str] = {}
    for part in served:
        value, source = parts_of(manifest)[part], manifest.sources.get(part)
        if value is not None and source is not None and not value.startswith(HUB):
            place = bundle / value
            directory = place if place.is_dir() else place.parent
            found |= {str(directory / name): digest for name, digest in source.files.items()}
    return found


def verify(files: Mapping[str, str]) -> None:
    """Compare files with their SHA-256. Raises ConfigError naming the first one that differs or is missing."""
    for name, digest in files.items():
        file = Path(name)
        if not file.is_file():
            raise ConfigError(f"{file} is missing, which its bundle was made with")
        if sha256(file) != digest:
            raise ConfigError(
                f"{file} is not the file that its bundle was made with (SHA-256 {digest}): damaged, or replaced; "
                "fetch the bundle again, or make it anew with `whiflash bundle create`"
            )


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

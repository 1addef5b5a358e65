"""Versions of a pair's weights: bundles in one directory, `000001`, `000002` and so on, and which of them is served.

A version is whole or not there: it is copied under another name and renamed. Version 0 is what the server was started
with, whose files are elsewhere. Imports no SGLang and no torch.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

from whiflash_sglang.checkpoints.hub import checksums, sha256, verify
from whiflash_sglang.checkpoints.manifest import HUB, MANIFEST, PARTS, Manifest, load_manifest
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.jsonl import write_whole
from whiflash_sglang.learn.samples import locked

CURRENT: Final = "current.json"
NOTES: Final = "notes.json"
"""In a version: what whoever made it says of it."""
MOST: Final = 10**6
"""Versions of a directory."""


class Served(NamedTuple):
    """version: that a server uses. before: the one that it used before that, for a rollback."""

    version: int = 0
    before: int = 0


def versions_of(learning: Path) -> Path:
    """Where the versions are, of the directory that `--whiflash-learn` names."""
    return learning / "versions"


def path_of(directory: Path, number: int) -> Path:
    """The bundle of a version."""
    return directory / f"{number:06d}"


def numbers(directory: Path) -> list[int]:
    """The versions that are there, ascending, without 0."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and len(p.name) == 6)


def read_version(directory: Path, number: int, target: str) -> dict[str, Path]:
    """Arm → checkpoint of a version, whose files are those that it was made with.

    Args:
        target: the model that the server's own bundle names; empty where it has none, so that any is taken.

    Raises:
        ConfigError: it is not there, is torn or damaged, is for another target, or its files are on a hub.
    """
    bundle = path_of(directory, number)
    if not bundle.is_dir():
        known = ", ".join(map(str, [0, *numbers(directory)]))
        raise ConfigError(f"{directory} has no version {number}; it has {known}")
    manifest = load_manifest(bundle)
    if target and manifest.target != target:
        raise ConfigError(f"version {number} is for the target {manifest.target}, the server's is {target}")
    for arm, place in manifest.drafters.items():
        source = manifest.sources.get(PARTS[arm])
        if place.startswith(HUB) or source is None or not source.files:
            raise ConfigError(
                f"version {number}: {bundle / MANIFEST} has no SHA-256 of files of {PARTS[arm]}: make it with "
                "`whiflash drafter add`"
            )
    verify(checksums(bundle, manifest, [PARTS[arm] for arm in manifest.drafters]))
    return {arm: bundle / place for arm, place in manifest.drafters.items()}


def publish(directory: Path, bundle: Path, notes: dict[str, Any] | None = None) -> int:
    """Copy the drafters of a bundle into the directory as its next version: its number.

    Raises:
        ConfigError: it is no bundle, or its drafters are on a hub. OSError.
    """
    manifest = load_manifest(bundle)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(directory):
        for left in directory.glob(".new-*"):  # of a process that was killed; nobody else writes now
            shutil.rmtree(left, ignore_errors=True)
        number = max(numbers(directory), default=0) + 1
        if number >= MOST:
            raise ConfigError(
                f"{directory} has a version {number - 1}, the last that there can be; use another one"
            )
        staged = Path(tempfile.mkdtemp(prefix=".new-", dir=directory))
        try:
            _copy(manifest, bundle, staged, number)
            (staged / NOTES).write_text(json.dumps(notes or {}, indent=2) + "\n", encoding="utf-8")
            _sync(staged)
            staged.rename(path_of(directory, number))
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    return number


def _copy(manifest: Manifest, bundle: Path, staged: Path, number: int) -> None:
    written: dict[str, Any] = {
        "schema_version": 1,
        "name": f"{manifest.name.partition('@')[0]}@{number}",
        "target": manifest.target,
        "dflash_vocabulary": manifest.dflash_vocabulary,
        "sources": {},
    }
    for arm, place in manifest.drafters.items():
        part = PARTS[arm]
        if place.startswith(HUB):
            raise ConfigError(
                f"{bundle / MANIFEST}: {part} is {place}, on a hub; fetch it, and name its directory"
            )
        files = [file for file in sorted((bundle / place).iterdir()) if file.is_file()]
        (staged / part).mkdir()
        for file in files:
            shutil.copyfile(file, staged / part / file.name)
        written[part] = part
        written["sources"][part] = {"files": {file.name: sha256(staged / part / file.name) for file in files}}
    (staged / MANIFEST).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    load_manifest(staged)


def _sync(directory: Path) -> None:
    """Have everything below on the disk before it is renamed."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def served(directory: Path) -> Served:
    """What a server of this directory used last. Raises ConfigError where the record is damaged."""
    file = directory / CURRENT
    try:
        found = Served(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Served()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is damaged ({error}): remove it, and choose a version again") from None
    if not all(type(number) is int and 0 <= number < MOST for number in found):
        raise ConfigError(f"{file} is damaged ({found}): remove it, and choose a version again")
    return found


def record(directory: Path, used: Served) -> None:
    """What a server that starts later uses. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(directory / CURRENT, json.dumps(used._asdict()))


def notes_of(directory: Path, number: int) -> dict[str, Any]:
    """What whoever made a version says of it; nothing where it says nothing that can be read."""
    try:
        found = json.loads((path_of(directory, number) / NOTES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def gain_of(directory: Path, number: int) -> dict[str, float]:
    """Drafter (`eagle3`, `dflash`) → tokens a round of a version divided by those of the version that it was learned
    from, as whoever made it says; 1 where nobody does.
    """
    notes = notes_of(directory, number)
    return {part: notes[part] if type(notes.get(part)) in (int, float) else 1.0 for part in PARTS.values()}

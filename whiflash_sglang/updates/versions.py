"""Versions of a pair's weights: bundles in one directory, `000001`, `000002` and so on, and which of them is served.

A version is whole or not there: it is copied under another name and renamed. Version 0 is what the server was started
with, whose files are elsewhere. Imports no SGLang and no torch.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, cast

from pydantic import BaseModel, ConfigDict, Field

from whiflash_sglang.checkpoints.bundles import write_bundle
from whiflash_sglang.checkpoints.hub import checksums, verify
from whiflash_sglang.checkpoints.manifest import HUB, MANIFEST, PARTS, Manifest, Source, load_manifest
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import locked
from whiflash_sglang.files.jsonl import drop_staged, read_json_file, staged, write_whole

CURRENT: Final = "current.json"
NOTES: Final = "notes.json"
"""File of a version with its maker's notes."""
MOST: Final = 10**6
"""Versions of a directory."""


class VersionInUse(NamedTuple):
    """version: that a server uses. before: the one that it used before that, for a rollback."""

    version: int = 0
    before: int = 0


class Wanted(BaseModel):
    """A version that a server is asked to use: its number, and what `claims_of` it says where the asker can read it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Annotated[int, Field(ge=0, lt=MOST)]
    target: str | None = None
    files: dict[str, str] = {}


def versions_of(learning: Path) -> Path:
    """The versions' directory in the one that `--whiflash-learn` names."""
    return learning / "versions"


def path_of(directory: Path, number: int) -> Path:
    """The bundle of a version."""
    return directory / f"{number:06d}"


def numbers(directory: Path) -> list[int]:
    """The versions that are there, ascending, without 0."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if re.fullmatch("[0-9]{6}", p.name))


def read_version(directory: Path, number: int, target: str) -> dict[str, Path]:
    """Arm → checkpoint of a version, whose files are those that it was made with.

    Args:
        target: the model that the server's own bundle names; empty where it has none, so that any is taken.

    Raises:
        ConfigError: it is not there, is torn or damaged, has a file without a sum, is for another target, or its files
            are on a hub. OSError.
    """
    bundle = path_of(directory, number)
    manifest = _manifest_of(directory, number)
    if target and manifest.target != target:
        raise ConfigError(f"version {number} is for the target {manifest.target}, the server's is {target}")
    for arm, place in manifest.drafters.items():
        source = manifest.sources.get(PARTS[arm])
        if place.startswith(HUB) or source is None or not source.files:
            raise ConfigError(
                f"version {number}: {bundle / MANIFEST} has no SHA-256 of files of {PARTS[arm]}: make it with "
                "`whiflash lab add-version`"
            )
        others = {path.name for path in (bundle / place).iterdir() if not path.is_dir()} - set(source.files)
        if others:
            raise ConfigError(
                f"version {number}: {bundle / MANIFEST} has no SHA-256 of {bundle / place / min(others)}: make the "
                "version with `whiflash lab add-version`"
            )
    verify(checksums(bundle, manifest, [PARTS[arm] for arm in manifest.drafters]))
    return {arm: bundle / place for arm, place in manifest.drafters.items()}


def _manifest_of(directory: Path, number: int) -> Manifest:
    """Manifest of a version; raises ConfigError if it is missing or damaged."""
    bundle = path_of(directory, number)
    if not bundle.is_dir():
        there = ", ".join(map(str, [0, *numbers(directory)]))
        raise ConfigError(f"{directory} has no version {number}; it has {there}")
    return load_manifest(bundle)


def claims_of(directory: Path, number: int) -> dict[str, Any]:
    """Claims of a version, for a request to a server to use it: `target`, and `files` by name with their SHA-256.

    Raises:
        ConfigError: it is not there, or damaged.
    """
    if not number:
        return {}
    manifest = _manifest_of(directory, number)
    files = {
        f"{PARTS[arm]}/{name}": digest
        for arm in manifest.drafters
        for name, digest in manifest.sources.get(PARTS[arm], Source()).files.items()
    }
    return {"target": manifest.target, "files": files}


def check_wanted(directory: Path, asked: Wanted) -> None:
    """Raise ConfigError where a version is not what `asked` says of it, naming what differs. OSError."""
    if asked.target is None and not asked.files:
        return
    number, own = asked.version, claims_of(directory, asked.version)
    if asked.target != own.get("target"):
        raise ConfigError(
            f"version {number} of {directory} is for the target {own.get('target')}, the one that is asked for is for "
            f"{asked.target!r:.200}: name the directory that this server reads its versions from"
        )
    files = own.get("files", {})
    if files != asked.files:
        name = min(name for name in {**files, **asked.files} if files.get(name) != asked.files.get(name))
        raise ConfigError(
            f"version {number} of {directory} is another than the one that is asked for: {name:.200} differs; name the "
            "directory that this server reads its versions from"
        )


def publish(
    directory: Path,
    bundle: Path,
    notes: dict[str, Any] | None = None,
    checkpoints: Mapping[str, Path] | None = None,
) -> int:
    """Copy the drafters of a bundle into the directory as its next version: its number.

    Args:
        checkpoints: by arm, in the place of the bundle's own.

    Raises:
        ConfigError: it is no bundle, or its drafters are on a hub. OSError.
    """
    manifest = load_manifest(bundle)
    if checkpoints is None:
        checkpoints = {arm: _inside(bundle, place) for arm, place in manifest.drafters.items()}
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(directory):
        drop_staged(directory)
        number = max(numbers(directory), default=0) + 1
        if number >= MOST:
            raise ConfigError(
                f"{directory} has a version {number - 1}, the last that there can be; use another one"
            )
        facts = {
            "name": f"{manifest.name.partition('@')[0]}@{number}",
            "target": manifest.target,
            "dflash_vocabulary": manifest.dflash_vocabulary,
            "quantization": {PARTS[arm]: "fp8" for arm in checkpoints if arm in manifest.quantised},
        }
        with staged(path_of(directory, number)) as made:
            made.mkdir(mode=0o700)
            files = {
                PARTS[arm]: [file for file in sorted(path.iterdir()) if not file.is_dir()]
                for arm, path in checkpoints.items()
            }
            write_bundle(made, facts, files)
            (made / NOTES).write_text(json.dumps(notes or {}, indent=2) + "\n", encoding="utf-8")
    return number


def _inside(bundle: Path, place: str) -> Path:
    """A part's directory. Raises ConfigError where it is on a hub."""
    if place.startswith(HUB):
        raise ConfigError(f"{bundle / MANIFEST}: {place} is on a hub; fetch it, and name its directory")
    return bundle / place


def served(directory: Path) -> VersionInUse:
    """Versions that a server of this directory used last. Raises ConfigError if the record is damaged."""
    file = directory / CURRENT
    try:
        record = VersionInUse(**read_json_file(file))
    except FileNotFoundError:
        return VersionInUse()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is damaged ({error}): remove it, and choose a version again") from None
    if not all(type(number) is int and 0 <= number < MOST for number in record):
        raise ConfigError(f"{file} is damaged ({record}): remove it, and choose a version again")
    return record


def record(directory: Path, used: VersionInUse) -> None:
    """Record the versions that a server that starts later uses. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(directory / CURRENT, json.dumps(used._asdict()))


def notes_of(directory: Path, number: int) -> dict[str, Any]:
    """Notes of a version's maker; empty if there are none that can be read."""
    try:
        notes = read_json_file(path_of(directory, number) / NOTES)
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def gain_of(directory: Path, number: int) -> dict[str, float]:
    """Drafter (`eagle3`, `dflash`) → tokens a round of a version divided by those of the version that it was learned
    from, as whoever made it says; 1 where nobody does.
    """
    notes = notes_of(directory, number)
    return {key: float(notes[key]) if is_number(notes.get(key)) else 1.0 for key in PARTS.values()}


def is_number(value: object) -> bool:
    """Whether a value of a note is a number that can be reckoned with."""
    return type(value) in (int, float) and math.isfinite(cast("float", value))

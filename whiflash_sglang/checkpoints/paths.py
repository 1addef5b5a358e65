"""Paths that a bundle names stay inside it: it may come from somebody else."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from whiflash_sglang.errors import ConfigError


def check_members(bundle: Path, named: Mapping[str, str | None]) -> None:
    """Check what a manifest's keys name, by key; None is nothing.

    A path is relative, climbs nowhere, and neither it nor a file in the directory that it names is a link out of the
    bundle. A snapshot of the hub's cache consists of links, into the `blobs` of its own repository.

    Raises:
        ConfigError: naming the key and the path.
    """
    roots = _roots(bundle)
    for key, value in named.items():
        if value is None:
            continue
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts:
            raise _leaves(bundle, key, value)
        for member in _reached(bundle / value):
            if not any(member.is_relative_to(root) for root in roots):
                raise _leaves(bundle, key, value, f", a link to {member}")


def _reached(path: Path) -> Iterator[Path]:
    """Where a path leads, and everything below it if it is a directory."""
    yield path.resolve()
    for directory, directories, files in os.walk(path):
        yield from (Path(directory, name).resolve() for name in (*directories, *files))


def _roots(bundle: Path) -> tuple[Path, ...]:
    bundle = bundle.resolve()
    if bundle.parent.name != "snapshots":
        return (bundle,)
    return (bundle, bundle.parent.parent / "blobs")


def _leaves(bundle: Path, key: str, value: str, how: str = "") -> ConfigError:
    return ConfigError(
        f"{bundle}/whiflash.json: key {key!r}: {value!r}{how} lies outside the bundle; a bundle names its own files, "
        "relative to it"
    )

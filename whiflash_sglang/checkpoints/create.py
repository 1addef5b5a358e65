"""A bundle from published checkpoints: their configurations first, weights when it is served."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_sglang import arms
from whiflash_sglang.checkpoints.fit import TargetShape, check_fit
from whiflash_sglang.checkpoints.hub import Found, look_up, sha256
from whiflash_sglang.checkpoints.manifest import HUB, MANIFEST, NAMES, PARTS, check_arms, load_manifest
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.models.formats import read_draft

_KEPT = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "mask_embedding.pt")
"""Files of a drafter that its loader reads."""


class Parts(NamedTuple):
    """Directories or hub ids, each with @revision if wanted. eagle3, diffusion: one of them may be None.
    router_sign: for a router that does not say its own.
    """

    target: str
    eagle3: str | None
    diffusion: str | None
    router: str | None = None
    router_sign: str | None = None


def create(parts: Parts, out: Path, name: str | None = None) -> dict[str, Any]:
    """Write a bundle into `out`: `whiflash.json`, and copies of what was given as a directory.

    Hub ids stay ids, pinned to the commit they are at now, and are fetched when the bundle is served. Nothing is
    written where something does not fit.

    Returns:
        The manifest.

    Raises:
        ConfigError: `out` exists, the hub gave nothing, no drafter was given, or one beside a router.
        CheckpointError: a drafter is not known or does not fit the target, naming the file and the key.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; give --out a new directory")
    said = {arms.AR: parts.eagle3, arms.DIFFUSION: parts.diffusion}
    places = {arm: place for arm, place in said.items() if place is not None}
    if not places:
        raise ConfigError("a bundle needs a drafter: give --eagle3, --diffusion or both")
    if parts.router is not None:
        check_arms("--router", NAMES, places)
    target = look_up(parts.target)
    shape = TargetShape.read(target.config)
    drafts = {arm: look_up(place) for arm, place in places.items()}
    for arm, found in drafts.items():
        draft = read_draft(found.config.parent, arm)
        if draft.format.layers_key is None:
            raise ConfigError(
                f"{places[arm]} is a target with a next-token head of its own, which drafts wherever a bundle names no "
                f"{NAMES[arm]} checkpoint: leave it out"
            )
        check_fit(draft, shape)
    given = {PARTS[arm]: found for arm, found in drafts.items()}
    if parts.router is not None:
        given["router"] = look_up(parts.router, config=False)
    manifest: dict[str, Any] = {"schema_version": 1, "name": name or out.name, "target": target.name}
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        sources: dict[str, Any] = {"target": {"revision": target.revision, "files": {}}}
        for part, found in given.items():
            manifest[part], sources[part] = _install(found, staged, part)
        if parts.router is not None:
            manifest["router"] = {"path": manifest["router"]} | (
                {"delta_sign": parts.router_sign} if parts.router_sign else {}
            )
        manifest["sources"] = sources
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        load_manifest(staged)
        staged.rename(out)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return manifest


def _install(found: Found, bundle: Path, part: str) -> tuple[str, dict[str, Any]]:
    """The manifest's entry of a part, with its origin."""
    if found.hub:
        known = [found.config] if found.config.is_file() else []
        return HUB + found.name, {"revision": found.revision, "files": _digests(known)}
    files = _members(found, part)
    (bundle / part).mkdir()
    for file in files:
        shutil.copyfile(file, bundle / part / file.name)
    return part, {"revision": None, "files": _digests(files)}


def _members(found: Found, part: str) -> list[Path]:
    """Files of a directory that are copied; a router may be given as its one file."""
    if part == "router" and found.config.name != "config.json":
        return [found.config]
    patterns = ("*.safetensors",) if part == "router" else _KEPT
    return sorted({file for pattern in patterns for file in found.config.parent.glob(pattern)})


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: sha256(file) for file in files}

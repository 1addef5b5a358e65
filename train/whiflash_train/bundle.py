"""Put bundles together from trained parts, or from published ones, whose weights are fetched when they are served."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_sglang.checkpoints.bundle import Bundle, digests, write_bundle
from whiflash_sglang.checkpoints.fit import TargetShape, check_fit
from whiflash_sglang.checkpoints.hub import Found, look_up
from whiflash_sglang.checkpoints.manifest import EMBEDDED_BUNDLE, HUB, MANIFEST, NAMES, PARTS, check_arms, load_manifest
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import copy_member
from whiflash_sglang.files.jsonl import read_json_file, staged
from whiflash_sglang.formats.table import read_draft
from whiflash_sglang.formats.uno import adapter_in
from whiflash_train.config import TrainConfig


def assemble(config: TrainConfig, bundle: Path, name: str) -> Path:
    """Copy EAGLE-3 and the configured block drafter from the work directory; write `whiflash.json`.

    An existing bundle keeps the other keys of its manifest, such as router and thresholds.

    Raises ConfigError if a drafter has not been trained yet. An error while files are copied changes nothing.
    """
    parts = {"eagle3": "eagle3", "dflash": config.block_drafter}
    for name_of in parts.values():
        if not (config.work / name_of / "checkpoint" / "config.json").is_file():
            raise ConfigError(f"{config.work / name_of} has no checkpoint: run `whiflash train --step {name_of}` first")
    path, vocabulary = bundle / MANIFEST, config.section(config.block_drafter).vocabulary
    bundle.mkdir(parents=True, exist_ok=True)
    sources: dict[str, Any] = dict(read_json_file(path).get("sources", {})) if path.exists() else {}
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=bundle) as scratch:
        copies = Path(scratch)
        for name_of in parts.values():
            shutil.copytree(config.work / name_of / "checkpoint", copies / name_of)
        if config.chat_template is not None:
            shutil.copyfile(config.chat_template, copies / "chat_template.jinja")
        for key, name_of in parts.items():
            # Loading the bundle compares its files with these digests.
            files = [copies / name_of / "config.json", *sorted((copies / name_of).glob("*.safetensors"))]
            sources[key] = {"files": digests(files)}
        for copy in list(copies.iterdir()):
            if (bundle / copy.name).exists():
                (bundle / copy.name).rename(copies / f"old-{copy.name}")
            copy.rename(bundle / copy.name)
    target = f"embedded:{EMBEDDED_BUNDLE}" if config.target == "embedded" else config.target
    manifest: dict[str, Any] = {"schema_version": 1, "name": name, "target": target}
    # An earlier bundle's acceptance was measured with other drafters.
    manifest |= {**parts, "dflash_vocabulary": vocabulary, "sources": sources, "acceptance": {}}
    if config.chat_template is not None:
        manifest["chat_template"] = "chat_template.jinja"
    update_manifest(bundle, manifest)
    return bundle


def update_manifest(bundle: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of `whiflash.json`; the file is replaced whole or not at all.

    Raises:
        ConfigError: the manifest would not be valid.
    """
    path = bundle / MANIFEST
    fields = read_json_file(path) if path.exists() else {}
    with staged(path) as file:
        file.write_text(json.dumps({**fields, **changes}, indent=2) + "\n", encoding="utf-8")
        load_manifest(file.parent)


_KEPT = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "mask_embedding.pt")
"""Patterns of the files that a drafter's loader reads."""


class BundleParts(NamedTuple):
    """Parts of a new bundle: directories or hub ids, optionally with @revision. eagle3, diffusion: one may be None.
    router_sign: for a router whose file does not name its sign.
    """

    target: str
    eagle3: str | None
    diffusion: str | None
    router: str | None = None
    router_sign: str | None = None


def create(parts: BundleParts, out: Path, name: str | None = None) -> dict[str, Any]:
    """Write a bundle into `out`: `whiflash.json`, and copies of the parts that are directories.

    Hub ids stay ids, pinned to their current commit, and are fetched when the bundle is served. If a part does not
    fit, nothing is written.

    Returns:
        The manifest.

    Raises:
        ConfigError: `out` exists, the hub fails, there is no drafter, or only one with a router.
        CheckpointError: a drafter's format is unknown or does not fit the target; names the file and the key.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; give --out a new directory")
    checkpoints = {arms.AR: parts.eagle3, arms.DIFFUSION: parts.diffusion}
    places = {arm: place for arm, place in checkpoints.items() if place is not None}
    if not places:
        raise ConfigError("a bundle needs a drafter: give --eagle3, --dflash or both")
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
    sources: dict[str, Any] = {"target": {"revision": target.revision}}
    facts = {"name": name or out.name, "target": target.name, "sources": sources}
    for key, found in given.items():
        facts[key] = HUB + found.name if found.hub else key
        if found.hub:
            configs = [found.config] if found.config.is_file() else []
            sources[key] = {"revision": found.revision, "files": digests(configs)}
    if parts.router is not None:
        sign = {"delta_sign": parts.router_sign} if parts.router_sign else {}
        facts["router"] = {"path": facts["router"], **sign}
    out.parent.mkdir(parents=True, exist_ok=True)
    with staged(out) as made:
        made.mkdir()
        copied = {key: _members(found, key) for key, found in given.items() if not found.hub}
        for key in copied.keys() - {"router"}:
            if not any(file.suffix in (".safetensors", ".bin") for file in copied[key]):
                raise ConfigError(f"{given[key].name} has no weights: fetch the checkpoint whole")
        return write_bundle(made, facts, copied)


def with_drafters(
    bundle: Path, checkpoints: Mapping[str, Path], out: Path, notes: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write a bundle `out`, whole or not at all: a copy of another one with other drafters.

    Only its owner can read it, since weights may reveal their training texts. Parts on a hub are not copied.

    Args:
        checkpoints: the new drafters, by arm. notes: content of further JSON files of the bundle, by file name.

    Raises:
        ConfigError: `copy_member` refuses a file of the bundle. OSError: also if `out` is a directory with files.
    """
    manifest, fields = load_manifest(bundle), read_json_file(bundle / MANIFEST)
    places = Bundle(bundle, manifest).parts
    named = {key: place for key, place in places.items() if not place.startswith(HUB)}
    parts = {key: bundle / place for key, place in named.items()}
    new = {PARTS[arm]: path for arm, path in checkpoints.items()}
    parts |= new
    if "uno" in parts:
        parts["uno"] = adapter_in(parts["uno"]) or parts["uno"]
    facts = {key: value for key, value in fields.items() if key not in parts} | {"name": out.name}
    if "acceptance" in fields:
        facts["acceptance"] = {key: value for key, value in fields["acceptance"].items() if key not in new}
    if "router" in parts:
        facts["router"] = {**fields["router"], "path": "router"}
    files = {
        key: [file for file in sorted(path.iterdir()) if not file.is_dir()] if path.is_dir() else [path]
        for key, path in parts.items()
    }
    with staged(out) as made:
        made.mkdir(mode=0o700)
        if manifest.chat_template is not None:
            facts["chat_template"] = copy_member(bundle / manifest.chat_template, made).name
        for name, note in notes.items():
            (made / name).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        write_bundle(made, facts, files)


def _members(found: Found, key: str) -> list[Path]:
    """Return the files of a directory part to copy; a router may also be a single file."""
    if key == "router" and found.config.name != "config.json":
        return [found.config]
    patterns = ("*.safetensors",) if key == "router" else _KEPT
    return sorted({file for pattern in patterns for file in found.config.parent.glob(pattern)})

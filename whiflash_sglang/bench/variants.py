"""Changed bundles that arms of the benchmark serve. Needs no server."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from whiflash_sglang.bench.arms import BAD, COPY_RULE, NO_LOOKUP
from whiflash_sglang.config import MANIFEST, load_manifest
from whiflash_sglang.lookup.copier import RULE_MATCH


def write_variant(arm: str, bundle: Path, directory: Path) -> Path:
    """Make the new `directory` a bundle that differs from `bundle` in what `arm` is about; returns it.

    Checkpoints are named where they lie, except those that change. Raises `ValueError` for an arm without a variant.
    """
    fields = _located(bundle)
    directory.mkdir()
    if arm == COPY_RULE:
        fields["lookup"] = {**fields.get("lookup", {}), "enabled": True, "min_match": RULE_MATCH}
    elif arm in (NO_LOOKUP, BAD):
        fields["lookup"] = {"enabled": False}
    else:
        raise ValueError(f"{arm} serves the bundle as it is")
    if arm == BAD:
        fields.pop("router", None)
        for part in ("eagle3", "dflash"):
            fields[part] = _shuffle(Path(fields[part]), directory / part)
    (directory / MANIFEST).write_text(json.dumps(fields), encoding="utf-8")
    return directory


def _located(bundle: Path) -> dict[str, Any]:
    """The manifest's fields with absolute paths."""
    fields = load_manifest(bundle).model_dump(mode="json", exclude_none=True)
    for key in ("eagle3", "dflash", "chat_template"):
        if key in fields:
            fields[key] = str((bundle / fields[key]).resolve())
    if "router" in fields:
        fields["router"]["path"] = str((bundle / fields["router"]["path"]).resolve())
    return fields


def _shuffle(checkpoint: Path, copy: Path) -> str:
    """Copy a drafter with every matrix shuffled: as slow as before, never right. Returns the copy's name."""
    random = torch.Generator().manual_seed(0)
    shutil.copytree(checkpoint, copy)
    for file in copy.glob("*.safetensors"):
        save_file({name: _shuffled(value, random) for name, value in load_file(file).items()}, file)
    return copy.name


def _shuffled(tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    if tensor.ndim < 2:
        return tensor
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=random)].view_as(tensor).contiguous()

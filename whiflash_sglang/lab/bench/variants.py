"""Changed bundles that arms of the benchmark serve. Needs no server."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from whiflash_sglang.checkpoints.manifest import MANIFEST, load_manifest
from whiflash_sglang.lab.bench.arms import BAD, COPY_RULE, NO_FORMS, NO_LOOKUP, NO_STRUCTURE
from whiflash_sglang.lookup.copier import RULE_MATCH


def write_variant(arm: str, bundle: Path, directory: Path) -> Path:
    """Make the new `directory` a bundle that differs from `bundle` in what `arm` is about; returns it.

    Files that do not change are links to the bundle's, where the file system allows.

    Raises:
        ValueError: an arm without a variant.
    """
    fields = load_manifest(bundle).model_dump(mode="json", exclude_none=True)
    if arm == COPY_RULE:
        fields["lookup"] = {**fields.get("lookup", {}), "enabled": True, "min_match": RULE_MATCH}
    elif arm not in (NO_LOOKUP, NO_STRUCTURE, NO_FORMS, BAD):
        raise ValueError(f"{arm} serves the bundle as it is")
    if arm == NO_FORMS:
        fields["lookup"] = {**fields.get("lookup", {}), "form_tokens": 0}
    if arm in (NO_LOOKUP, BAD):
        fields["lookup"] = {"enabled": False}
    if arm in (NO_STRUCTURE, BAD):
        fields["structure"] = {"enabled": False}
    shutil.copytree(bundle, directory, copy_function=_link)
    if arm == BAD:
        fields.pop("router", None)
        for part in {"eagle3", "dflash"} & fields.keys():
            _shuffle(directory / fields[part])
    (directory / MANIFEST).unlink()  # it is the bundle's own
    (directory / MANIFEST).write_text(json.dumps(fields), encoding="utf-8")
    return directory


def _link(source: str, target: str) -> str:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _shuffle(checkpoint: Path) -> None:
    """Shuffle every matrix of a drafter: as slow as before, never right."""
    random = torch.Generator().manual_seed(0)
    for file in checkpoint.glob("*.safetensors"):
        shuffled = {name: _shuffled(value, random) for name, value in load_file(file).items()}
        file.unlink()  # it is the bundle's own
        save_file(shuffled, file)


def _shuffled(tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    if tensor.ndim < 2:
        return tensor
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=random)].view_as(tensor).contiguous()

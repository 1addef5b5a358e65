"""Versions of tiny drafters: what a learner could have made of them, and what must be refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whiflash_sglang.updates.versions import publish
from whiflash_train.bundle import BundleParts, create

FROZEN = ("fc.", "k_proj", "v_proj", "k_norm", "input_layernorm", "hidden_norm", "d2t", "t2d")
"""Parts of the tiny EAGLE-3's file that draft KV is made with."""

Change = Callable[[str, Tensor], Tensor]


class Pair(Protocol):
    """Checkpoints of a target and of its two drafters."""

    @property
    def target(self) -> Path: ...

    @property
    def eagle3(self) -> Path: ...

    @property
    def dflash(self) -> Path: ...


def trained(strength: float, seed: int) -> Change:
    """Noise on everything that may change."""
    random = torch.Generator().manual_seed(seed)

    def change(name: str, value: Tensor) -> Tensor:
        # A block drafter's input norm reads its own rows only, but the file names it as EAGLE-3's.
        if any(part in name for part in FROZEN):
            return value
        return value + strength * torch.randn(value.shape, generator=random)

    return change


def changed(original: Path, into: Path, change: Change, config: Mapping[str, object] | None = None) -> Path:
    """A copy of a checkpoint with every tensor changed."""
    into.mkdir(parents=True)
    tensors = {name: change(name, value) for name, value in load_file(original / "model.safetensors").items()}
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((original / "config.json").read_text()) | dict(config or {})
    (into / "config.json").write_text(json.dumps(said))
    return into


def bundle_of(models: Pair, root: Path, eagle3: Path | None = None, dflash: Path | None = None) -> Path:
    """A bundle of these checkpoints."""
    parts = BundleParts(str(models.target), str(eagle3) if eagle3 else None, str(dflash) if dflash else None)
    create(parts, root)
    return root


def version(models: Pair, directory: Path, scratch: Path, change: Change) -> int:
    """The next version: both drafters with every tensor changed."""
    eagle3, dflash = (
        changed(original, scratch / name, change)
        for name, original in (("eagle3", models.eagle3), ("dflash", models.dflash))
    )
    return publish(directory, bundle_of(models, scratch / "bundle", eagle3, dflash))

"""A pair of drafters as replays need it: what a bundle names, and what is loaded of it."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from whiflash_sglang import arms
from whiflash_sglang.checkpoints.manifest import PARTS, Lookup, load_manifest, lookup_of
from whiflash_sglang.checkpoints.members import member
from whiflash_sglang.models.choice import DraftHead
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.models.formats import read_draft
from whiflash_sglang.models.origin import Origin

ARMS = ("eagle3", "dflash")
"""The trained drafters, between which the paper's routers choose; a bundle may have one of them alone."""


class Parts(NamedTuple):
    """What a server drafts with: one or both checkpoints, drafts of a chain, what blocks choose from, copying."""

    eagle3: Path | None
    dflash: Path | None
    eagle_steps: int = 5
    dflash_vocabulary: str = "full"
    lookup: Lookup = Lookup()

    @classmethod
    def of_bundle(cls, bundle: Path, eagle_steps: int = 5) -> "Parts":
        """As the bundle's manifest says."""
        manifest = load_manifest(bundle)
        eagle3, dflash = (
            member(bundle, manifest, part) if getattr(manifest, part) else None for part in ARMS
        )
        return cls(
            eagle3,
            dflash,
            eagle_steps,
            manifest.dflash_vocabulary,
            lookup_of(manifest),
        )

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """Directories of those that are there."""
        return tuple(path for path in (self.eagle3, self.dflash) if path is not None)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names that a server has for them."""
        return tuple(arm for arm, part in PARTS.items() if getattr(self, part))

    @property
    def captured(self) -> list[int]:
        """Target layers that they read, ascending."""
        return sorted(
            {layer for path in self.checkpoints for layer in read_draft(path).config.target_layer_ids}
        )


class Pair(NamedTuple):
    """The drafters, loaded, one of which may be missing, and the settings of the copying arm.

    `block_head`: what a block drafter chooses from. `digest`: of everything that decides what they draft; replays are
    kept under it.
    """

    eagle3: Eagle3Drafter | None
    dflash: DFlashDrafter | None
    eagle_steps: int
    block_head: DraftHead | None
    digest: str
    lookup: Lookup

    @classmethod
    def load(cls, parts: Parts, target: Origin) -> "Pair":
        """Read the checkpoints. Raises `CheckpointError` where one does not fit the target."""
        digest = hashlib.sha256(json.dumps([parts.eagle_steps, parts.dflash_vocabulary]).encode())
        for path in parts.checkpoints:
            for file in (path / "config.json", *sorted(path.glob("*.safetensors"))):
                digest.update(file.read_bytes())
        options: dict[str, Any] = {
            "device": target.device,
            "dtype": target.dtype,
            "target_embedding": target.embedding,
            "target_lm_head": target.head,
        }
        eagle3, dflash = (
            None if path is None else read_draft(path, arm).load(**options)
            for arm, path in ((arms.AR, parts.eagle3), (arms.DIFFUSION, parts.dflash))
        )
        if dflash is not None:
            dflash.embedding_scale = target.embedding_scale
        head = None if dflash is None else dflash.head
        if head is not None and eagle3 is not None and parts.dflash_vocabulary == "eagle3":
            rows = torch.arange(eagle3.draft_vocab_size, device=target.device)
            head = head.within(eagle3.target_ids(rows))
        return cls(eagle3, dflash, parts.eagle_steps, head, digest.hexdigest()[:16], parts.lookup)

    @property
    def longest(self) -> dict[str, int]:
        """Drafts of a round of each drafter that is there, at most."""
        drafts = {} if self.eagle3 is None else {"eagle3": self.eagle_steps}
        return drafts if self.dflash is None else {**drafts, "dflash": self.dflash.config.max_drafts}

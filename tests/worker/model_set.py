"""A tiny target, its two drafters, and the reference computations for them."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference import ReferenceDrafters
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target


@dataclass(frozen=True)
class Models:
    """Checkpoints on disk, and the reference computations for them."""

    target: Path
    eagle3: Path
    dflash: Path
    reference: ReferenceDrafters

    def whiflash(self, router: str, keys: dict[str, Any] | None = None, **flags: Any) -> dict[str, Any]:
        """Arguments of `engine(whiflash=...)`. keys: of a bundle's manifest; without any there is no bundle."""
        if keys is None:
            drafters = {"draft": self.dflash, "whiflash_eagle_draft": str(self.eagle3)}
        else:
            drafters = {"draft": self._bundle(keys)}
        return {**drafters, "whiflash_router": router, **flags}

    def _bundle(self, keys: dict[str, Any]) -> Path:
        parts = {"eagle3": str(self.eagle3), "dflash": str(self.dflash)}
        manifest = {"schema_version": 1, "name": "tiny", "target": str(self.target), **keys}
        name = hashlib.sha256(json.dumps([parts, manifest]).encode()).hexdigest()[:12]
        bundle = self.target.with_name(f"bundle-{name}")
        if not bundle.exists():
            for part, place in parts.items():
                shutil.copytree(place, bundle / part, copy_function=os.link)
            (bundle / "whiflash.json").write_text(json.dumps(manifest | {part: part for part in parts}))
        return bundle

    def served(self, router: str, admin_key: str, **flags: Any) -> list[str]:
        """Arguments of `host.running(...)`, for a server that takes token ids."""
        given = self.whiflash(router, **flags)
        draft = given.pop("draft")
        return [
            *("--model-path", str(self.target), "--dtype", "float32", "--skip-tokenizer-init"),
            *("--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", str(draft)),
            *(str(part) for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)),
            *("--admin-api-key", admin_key),
        ]


def build_models(root: Path, eagle3_layers: int = 1, *, peaked: bool = False) -> Models:
    """Write the checkpoints under `root`. peaked: as of `tiny_target`."""
    target = tiny_target(root / "target", peaked=peaked)
    eagle3 = tiny_eagle3(root / "eagle3", target, num_layers=eagle3_layers)
    dflash = tiny_dflash(root / "dflash", target)
    return Models(target, eagle3, dflash, ReferenceDrafters(target, eagle3, dflash))

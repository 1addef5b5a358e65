"""A tiny target, its two drafters, and the reference computations for them."""

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

    def whiflash(self, router: str, **flags: Any) -> dict[str, Any]:
        """Arguments of `engine(whiflash=...)`."""
        return {
            "draft": self.dflash,
            "whiflash_eagle_draft": str(self.eagle3),
            "whiflash_router": router,
            **flags,
        }


def build_models(root: Path, eagle3_layers: int = 1) -> Models:
    """Write the checkpoints under `root`."""
    target = tiny_target(root / "target")
    eagle3 = tiny_eagle3(root / "eagle3", target, num_layers=eagle3_layers)
    dflash = tiny_dflash(root / "dflash", target)
    return Models(target, eagle3, dflash, ReferenceDrafters(target, eagle3, dflash))

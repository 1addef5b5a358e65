"""Which drafters there are, and which routers need which. Imports no SGLang."""

from collections.abc import Collection, Mapping
from typing import Final

from whiflash_sglang import arms
from whiflash_sglang.errors import ConfigError

PARTS: Final[Mapping[str, str]] = {arms.AR: "eagle3", arms.DIFFUSION: "dflash"}
"""Arm → key of its checkpoint in a manifest."""

NAMES: Final[Mapping[str, str]] = {arms.AR: "EAGLE-3", arms.DIFFUSION: "DFlash"}
"""Arm → what its checkpoint is called in sentences."""

NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "entropy": (arms.AR, arms.DIFFUSION),
    "neural": (arms.AR, arms.DIFFUSION),
    "ar": (arms.AR,),
    "diffusion": (arms.DIFFUSION,),
    "copy-rule": (arms.AR,),
}
"""Router → arms that it cannot do without; others route between those that are there."""


def check_router(router: str, there: Collection[str]) -> None:
    """Raise ConfigError where `router` needs an arm that is not among those that are `there`."""
    check_arms(f"router {router!r}", NEEDED.get(router, ()), there)


def check_arms(what: str, needed: Collection[str], there: Collection[str]) -> None:
    """Raise ConfigError naming the drafter that `what` needs and that is not `there`."""
    missing = [NAMES[arm] for arm in needed if arm not in there]
    if missing:
        has = " and ".join(NAMES[arm] for arm in NAMES if arm in there) or "none"
        raise ConfigError(
            f"{what} needs {' and '.join(NAMES[arm] for arm in needed)}; the drafters here are: {has}"
        )

"""A published draft format: its name, how its files are read, which model they fill."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whiflash_sglang.formats.config_json import misfit

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DraftFormat:
    """One family of checkpoints.

    Attributes:
        name: as people call it. arm: which arm it becomes, of `whiflash_sglang.drafts.arms`.
        keys: what `format_key` gives for its checkpoints, each of one format only.
        layers_key: where its `config.json` lists the target's layers; None: it is part of the target and reads what its
            head reads.
        read: `config.json` → the arm's configuration; raises `CheckpointError` naming the key that does not fit.
        model: the drafter's class; its `load` reads the weights.
        published: who publishes it, for the documentation. defined_by: the implementation it is compared with.
        upstream: SGLang's algorithm for these checkpoints, which benchmarks compare with; None: it has none.
    """

    name: str
    arm: str
    keys: tuple[str, ...]
    layers_key: str | None
    read: Callable[[Path, Json], Any]
    model: Any
    published: str
    defined_by: str
    upstream: str | None


def merged(path: Path, config: Json, *sections: str) -> dict[str, Any]:
    """`config` of the checkpoint at `path`, and over it what its nested `sections` say, the last over those before.

    Raises:
        CheckpointError: one is no object.
    """
    settings = dict(config)
    for name in sections:
        section = config.get(name) or {}
        if not isinstance(section, Mapping):
            raise misfit(path, f"{name} must be an object, got {section!r}")
        settings |= section
    return settings


def format_key(path: Path, config: Json) -> str | None:
    """A checkpoint's name: `speculators/TYPE`, a projector that changes the draft pass, or its architecture."""
    kind = config.get("speculators_model_type")
    if kind:
        return f"speculators/{kind}"
    projector = merged(path, config, "dflash_config").get("projector_type")
    if projector not in (None, "dflash", "dspark"):
        return f"projector/{projector}"
    return next(iter(config.get("architectures") or ()), None)


def pick(formats: Mapping[str, DraftFormat], config: Json, path: Path) -> DraftFormat:
    """The format of the checkpoint at `path`. Raises CheckpointError naming what it says and what is known."""
    key = format_key(path, config)
    if key in formats:
        return formats[str(key)]
    where, _, kind = (key or "").partition("/")
    spelled = {"speculators": "speculators_model_type", "projector": "projector_type"}
    said = f"{spelled[where]} {kind!r}" if kind else f"architectures {config.get('architectures')}"
    raise misfit(
        path, f"{said} is no draft architecture that is known here (known: {', '.join(sorted(formats))})"
    )

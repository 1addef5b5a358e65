"""Describe a published draft format (name, reader, model class), and find a checkpoint's format by `config.json`."""

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
        name: the usual name. arm: the arm that its drafters serve, of `whiflash_sglang.drafts.arms`.
        keys: values of `format_key` for its checkpoints; no two formats share one.
        layers_key: key of its `config.json` that lists the target's layers; None: it is part of the target and reads
            the target's final state.
        read: `config.json` → the arm's configuration; raises `CheckpointError` naming the key that does not fit.
        model: the drafter's class; its `load` reads the weights.
        published: its publishers, for the documentation. defined_by: the implementation that tests compare it with.
        upstream: SGLang's algorithm for these checkpoints, which benchmarks compare with; None if it has none.
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
    """Merge the nested `sections` of `config` over its top level; later sections win. path: the checkpoint, for errors.

    Raises:
        CheckpointError: a section is no object.
    """
    settings = dict(config)
    for name in sections:
        section = config.get(name) or {}
        if not isinstance(section, Mapping):
            raise misfit(path, f"{name} must be an object, got {section!r}")
        settings |= section
    return settings


def format_key(path: Path, config: Json) -> str | None:
    """Return the key of a checkpoint's format: `speculators/TYPE`, `projector/TYPE`, or its architecture."""
    kind = config.get("speculators_model_type")
    if kind:
        return f"speculators/{kind}"
    projector = merged(path, config, "dflash_config").get("projector_type")
    if projector not in (None, "dflash", "dspark"):
        return f"projector/{projector}"
    return next(iter(config.get("architectures") or ()), None)


def pick(formats: Mapping[str, DraftFormat], config: Json, path: Path) -> DraftFormat:
    """Return the format of the checkpoint at `path`. Raises CheckpointError naming its key and the known keys."""
    key = format_key(path, config)
    if key in formats:
        return formats[str(key)]
    where, _, kind = (key or "").partition("/")
    spelled = {"speculators": "speculators_model_type", "projector": "projector_type"}
    said = f"{spelled[where]} {kind!r}" if kind else f"architectures {config.get('architectures')}"
    raise misfit(path, f"{said} is no draft architecture that is known here (known: {', '.join(sorted(formats))})")

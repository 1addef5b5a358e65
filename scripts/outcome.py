"""Markdown of what a script found, with how it was made."""

import shlex
from pathlib import Path

from whiflash_sglang import provenance
from whiflash_sglang.checkpoints.manifest import embedded_bundle


def write(path: Path, title: str, *paragraphs: str) -> None:
    """`paragraphs` under `title`; behind them command, revision, versions and machine."""
    made = provenance.environment(embedded_bundle())
    revision = made["revision"][:12] + (" with changes" if made["uncommitted_changes"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in made["packages"].items() if version)
    hardware = made["hardware"]
    how = (
        f"`python scripts/{shlex.join(made['command'])}`, revision {revision}; Python {made['python']}, {versions}; "
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gb']} GB."
    )
    path.write_text("\n\n".join((f"# {title}", *paragraphs, "## How to reproduce", how)) + "\n")

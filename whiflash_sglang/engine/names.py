"""Members and parameters of SGLang's that are used and not replaced, by module in `names.txt`: each is checked before
anything is replaced.

A name that is only imported is checked by its import. Replaced names have their own table (`engine/patching.py`).
"""

from collections.abc import Mapping
from pathlib import Path

from whiflash_sglang.engine.supported import has


def _read(table: str) -> Mapping[str, tuple[str, ...]]:
    """Without the names, and the modules with all of theirs, that the installed release does not have.

    A name whose parameters take more than a line has several. Behind a `#`, the release that brought it. A name that
    only an older one has changes no more, and is left out.
    """
    module, there, found = "", True, dict[str, tuple[str, ...]]()
    for line in table.strip().split("\n"):
        entry, _, since = line.partition("  # since ")
        name, _, parameters = entry.strip().rstrip(")").partition("(")
        known = not since or has(since)
        if not line.startswith(" "):
            module, there = name, known
        elif there and known:
            path = f"{module}:{name}"
            found[path] = found.get(path, ()) + tuple(parameters.split(", ") if parameters else ())
    return found


PRIVATE_NAMES = _read(Path(__file__).with_suffix(".txt").read_text("utf-8"))
"""Parameters that must be among a name's own, by `module:attribute.path`; none of what is not called."""

HEAVY = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.entrypoints.openai",
    "sglang.srt.entrypoints.anthropic.serving",
    "sglang.launch_server",
    "sglang.srt.managers.multi_tokenizer_mixin",
    "sglang.srt.models.",
    "sglang.kernels.ops.attention.linear.",
    "sglang.kernels.ops.mamba.",
    "sglang.srt.layers.attention.linear.",
)
"""Modules of a launcher or of recurrent targets: checked by `whiflash check` and the tests, not at every start."""

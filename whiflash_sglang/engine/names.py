"""Read `names.txt`: SGLang's members and parameters that we use and do not replace, by module. Each is checked before
anything is replaced.

A name that is only imported is checked by its import. Replaced names have their own table (`engine/patching.py`).
"""

from collections.abc import Mapping
from pathlib import Path


def _read(table: str) -> Mapping[str, tuple[str, ...]]:
    """Parse `names.txt` into name → parameters. A name whose parameters need more than one line has several lines."""
    module, found = "", dict[str, tuple[str, ...]]()
    for line in table.strip().split("\n"):
        name, _, parameters = line.strip().rstrip(")").partition("(")
        if not line.startswith(" "):
            module = name
        else:
            path = f"{module}:{name}"
            found[path] = found.get(path, ()) + tuple(parameters.split(", ") if parameters else ())
    return found


PRIVATE_NAMES = _read(Path(__file__).with_suffix(".txt").read_text("utf-8"))
"""Parameters that a name must have, by `module:attribute.path`; empty for names that we do not call."""

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

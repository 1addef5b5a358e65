"""SGLang on the CPU: a platform plugin that boots stock SGLang on a machine where nothing else could.

Nothing imports it: SGLang and `whiflash check` find it by its entry points.
"""

from whiflash_sglang.files.cpu import serves_here

__version__ = "0.1.0"


def activate() -> str | None:
    """Entry point of the group ``sglang.srt.platforms``: the dotted path of the platform class, or None."""
    return "whiflash_cpu.cpu:CpuPlatform" if serves_here() else None

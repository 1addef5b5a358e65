"""SGLang on the CPU: a platform plugin that runs stock SGLang on a machine without an accelerator.

Nothing imports this package: SGLang and `whiflash check` find it by its entry points.
"""

from whiflash_sglang.files.cpu import serves_here

__version__ = "0.1.0"


def activate() -> str | None:
    """Return the dotted path of the platform class if this machine uses it, else None. SGLang calls this."""
    return "whiflash_cpu.cpu:CpuPlatform" if serves_here() else None

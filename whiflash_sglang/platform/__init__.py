"""SGLang on the CPU: a platform plugin that boots stock SGLang on a machine where nothing else could.

Nothing of this project imports it but `whiflash check`: SGLang finds it by its entry point.
"""

from whiflash_sglang.device.cpu import serves_here


def activate() -> str | None:
    """Entry point of the group ``sglang.srt.platforms``: the dotted path of the platform class, or None."""
    return "whiflash_sglang.platform.cpu:CpuPlatform" if serves_here() else None

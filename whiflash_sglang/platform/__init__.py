"""SGLang on the CPU: a platform plugin that boots stock SGLang on a machine where nothing else could."""

NAME = "whiflash_cpu"
"""The entry point's name, as `SGLANG_PLATFORM` takes it."""


def activate() -> str | None:
    """Entry point of the group ``sglang.srt.platforms``.

    Returns:
        The dotted path of the platform class, or None where SGLang has something of its own to run on: an
        accelerator that torch knows, or its CPU engine (``SGLANG_USE_CPU_ENGINE=1``). ``SGLANG_PLATFORM`` overrides
        the latter.
    """
    import os

    import torch

    if torch.cuda.is_available() or torch.accelerator.is_available():
        return None
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" and os.environ.get("SGLANG_PLATFORM") != NAME:
        return None
    return "whiflash_sglang.platform.cpu:CpuPlatform"

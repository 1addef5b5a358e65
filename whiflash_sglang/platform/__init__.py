"""SGLang on the CPU: a platform plugin that boots stock SGLang on a machine without an accelerator."""


def activate() -> str | None:
    """Entry point of the group ``sglang.srt.platforms``.

    Returns:
        The dotted path of the platform class, or None where torch has an accelerator: SGLang's own platform
        serves that.
    """
    import torch

    if torch.cuda.is_available() or torch.accelerator.is_available():
        return None
    return "whiflash_sglang.platform.cpu:CpuPlatform"

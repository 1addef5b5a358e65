"""Bigram keys in the radix tree.

EAGLE-3's entry p holds the *next* token, so with plain keys the last cached slot before a branch would hold
another continuation's KV. Upstream turns bigram keys on only for `is_eagle()`; here they are turned on for
WHIFLASH alone, without claiming to be EAGLE anywhere else.
"""

from functools import wraps
from typing import Any

from sglang.srt.mem_cache import kv_cache_builder

from whiflash_sglang.compat.carried import serves_ours
from whiflash_sglang.compat.patching import replace


def install() -> None:
    """Idempotent."""
    replace(kv_cache_builder, "CacheInitParams", _with_bigrams)


def _with_bigrams(original: Any) -> Any:
    @wraps(original, updated=())
    def build(*args: Any, **kwargs: Any) -> Any:
        if serves_ours():
            kwargs["is_eagle"] = True
        return original(*args, **kwargs)

    return build

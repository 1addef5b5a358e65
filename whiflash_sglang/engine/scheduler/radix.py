"""Bigram keys in the radix tree.

EAGLE-3's entry p holds the *next* token, so with plain keys the last cached slot before a branch would hold
another continuation's KV. Upstream turns bigram keys on only for `is_eagle()`; here they are turned on for
WHIFLASH with an autoregressive drafter, without claiming to be EAGLE anywhere else.
"""

from functools import wraps
from typing import Any

from sglang.srt.runtime_context import get_server_args

from whiflash_sglang.drafts import arms
from whiflash_sglang.engine.carried import serves_ours, settings_of
from whiflash_sglang.engine.patching import around


@around(
    "sglang.srt.mem_cache.kv_cache_builder:CacheInitParams",
    params=("is_eagle",),
    why="SGLang has bigram keys for `is_eagle()` only",
    until="an algorithm may ask for them",
    makes=True,
)
def _with_bigrams(original: Any) -> Any:
    """The tree has bigram keys where EAGLE-3 drafts."""

    @wraps(original, updated=())
    def build(*args: Any, **kwargs: Any) -> Any:
        if serves_ours() and arms.AR in settings_of(get_server_args()).drafters:
            kwargs["is_eagle"] = True
        return original(*args, **kwargs)

    return build

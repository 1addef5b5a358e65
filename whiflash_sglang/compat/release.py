"""Every end of a request's KV, retraction and preemption included, of which SGLang tells no worker.

`prepare_for_kv_cache_release` covers finished requests only; `release_kv_cache` is the one function they all go
through.
"""

import sys
from functools import wraps
from typing import Any, Protocol
from weakref import ReferenceType, ref

from sglang.srt.mem_cache import common

from whiflash_sglang.compat.patching import replace


class Owner(Protocol):
    """Who keeps something per request."""

    def released(self, req: Any, *, enters_tree: bool) -> None: ...


_owner: ReferenceType[Any] | None = None


def notify(owner: Owner) -> None:
    """`owner` is told of every release from now on; it is not kept alive."""
    global _owner
    _owner = ref(owner)


def install() -> None:
    """Idempotent."""
    original = common.release_kv_cache
    replace(common, "release_kv_cache", _noting)
    for name, module in list(sys.modules.items()):
        # Modules that imported the function by name hold the original.
        if name.startswith("sglang.srt") and getattr(module, "release_kv_cache", None) is original:
            module.release_kv_cache = common.release_kv_cache  # type: ignore[attr-defined]


def _noting(original: Any) -> Any:
    @wraps(original)
    def release_kv_cache(req: Any, tree_cache: Any, *, checkpoint: bool) -> None:
        owner = _owner() if _owner is not None else None
        if owner is not None:
            owner.released(req, enters_tree=checkpoint)
        original(req, tree_cache, checkpoint=checkpoint)

    return release_kv_cache

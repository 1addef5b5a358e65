"""Give the radix tree bigram keys.

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
from whiflash_sglang.engine.scheduler.session_tree import SessionTree


@around(
    "sglang.srt.mem_cache.kv_cache_builder:CacheInitParams",
    params=("is_eagle",),
    why="SGLang has bigram keys for `is_eagle()` only",
    until="an algorithm may ask for them",
    makes=True,
)
def _with_bigrams(original: Any) -> Any:
    """Give the radix tree bigram keys if EAGLE-3 drafts."""

    @wraps(original, updated=())
    def build(*args: Any, **kwargs: Any) -> Any:
        if serves_ours() and arms.AR in settings_of(get_server_args()).drafters:
            kwargs["is_eagle"] = True
        return original(*args, **kwargs)

    return build


class BigramTree(SessionTree):
    """A tree with bigram keys that keeps and finds as many slots as one with plain keys.

    SGLang ends a key with the last token that has KV, and limits a prompt's hit in tokens: both cost a slot.
    """

    def checkpoint_into_tree(self, req: Any, *, up_to: int, **named: Any) -> None:
        """End a finished request's key with its last token, which has no KV: drafters have ingested that pair."""
        if req.finished():
            up_to = min(up_to + 1, len(req.origin_input_ids) + len(req.output_ids_through_stop))
        super().checkpoint_into_tree(req, up_to=up_to, **named)

    def _match_tree(self, params: Any) -> Any:
        key = params.key
        if key.limit is not None and not key.is_bigram:
            key.limit += 1
        return super()._match_tree(params)

"""Every end of a request's KV, retraction and preemption included, of which SGLang tells no worker.

Its own hook covers finished requests only; `release_kv_cache` is the one function they all go through.
"""

import sys
from contextlib import nullcontext
from functools import wraps
from typing import Any, Protocol
from weakref import ReferenceType, ref

from sglang.srt.mem_cache import common
from sglang.srt.session.streaming_session import StreamingSession

from whiflash_sglang.compat.carried import serves_ours
from whiflash_sglang.compat.late import behind_forward
from whiflash_sglang.compat.patching import replace


class Owner(Protocol):
    """Who keeps something per request."""

    def released(self, req: Any, *, kept: bool) -> None: ...


_owner: ReferenceType[Any] | None = None
_runner: ReferenceType[Any] | None = None


def notify(owner: Owner, runner: Any) -> None:
    """`owner` is told of every release from now on, behind the forwards of `runner`; neither is kept alive."""
    global _owner, _runner
    _owner, _runner = ref(owner), ref(runner)


def install() -> None:
    """Idempotent."""
    replace(StreamingSession, "try_cache_finished_req", _keeping_what_was_computed)
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
        runner = _runner() if _runner is not None else None
        if owner is not None and runner is not None and serves_ours():
            # A session keeps the slots of a turn that is retracted, too.
            kept = checkpoint or (req.session is not None and req.session.streaming)
            with behind_forward(runner) if kept else nullcontext():
                owner.released(req, kept=kept)
        original(req, tree_cache, checkpoint=checkpoint)

    return release_kv_cache


def _keeping_what_was_computed(original: Any) -> Any:
    """A session keeps a turn's slots up to its last token, which no forward has seen.

    Upstream takes what is allocated for computed: true of plain decoding, which allocates no slot before it needs it.
    """

    @wraps(original)
    def try_cache_finished_req(self: StreamingSession, req: Any) -> bool:
        session = req.session
        known = len(req.origin_input_ids) + len(req.output_ids_through_stop)
        kept: bool = original(self, req)
        if kept and serves_ours():
            kv = self.slots[session.session_id].kv
            kv.kv_committed_len = min(kv.kv_committed_len, known - 1)
        return kept

    return try_cache_finished_req

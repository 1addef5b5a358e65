"""Report every end of a request's KV to the worker, retraction and preemption included.

SGLang's own hook covers finished requests only; `release_kv_cache` is the one function that all ends go through.
"""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from sglang.srt.session.streaming_session import StreamingSession

from whiflash_sglang.engine.carried import serves_ours
from whiflash_sglang.engine.patching import around
from whiflash_sglang.engine.scheduler.overlap import behind_forward

_worker: Callable[[], Any] | None = None


def notify(worker: Any) -> None:
    """Make `our_worker` return this worker, for patches that get no scheduler. The reference is weak."""
    global _worker
    _worker = ref(worker)


def our_worker() -> Any:
    """Return the worker of this process's engine; None if the engine does not run WHIFLASH."""
    return _worker() if _worker is not None and serves_ours() else None


@around(
    "sglang.srt.mem_cache.common:release_kv_cache",
    params=("req", "tree_cache", "checkpoint"),
    why="a worker learns of finished requests only",
    until="it learns of every release",
    everywhere=True,
)
def _noting(original: Any, req: Any, tree_cache: Any, *, checkpoint: bool) -> None:
    """Report each request whose KV is released to the worker, before SGLang frees the slots."""
    worker = our_worker()
    if worker is not None:
        saved = req.kv.retraction_backup is not None  # a decode server retracts it
        # A session keeps the slots even of a turn that is retracted.
        kept = checkpoint or saved or (req.session is not None and req.session.streaming)
        worker.stages.lifecycle.released(req, kept=kept)
        if saved or not worker.flushes_later:
            flush(worker)
        if not (worker.flushes_later and worker.overlaps):
            worker.stages.lifecycle.settle()  # before the answer leaves: its last round is known
        if saved and worker.primary_draft_kv_pool is not None:
            # The draft KV waits on the host, as the target's does; its slots are given up next.
            req._whiflash_kv = worker.primary_draft_kv_pool.get_cpu_copy(slots_of(worker, req))
    original(req, tree_cache, checkpoint=checkpoint)


def slots_of(worker: Any, req: Any) -> torch.Tensor:
    """Return the slots of a request's KV, [n] int64."""
    slots: torch.Tensor = worker.target.slot_table[req.kv.req_pool_idx, : req.seqlen - 1].long()
    return slots


def flush(worker: Any) -> None:
    """Ingest the parked features of requests that were released, if there are any."""
    if worker.sync.leaving:
        with behind_forward(worker.target.runner):
            worker.sync.flush()


@around(
    "sglang.srt.session.streaming_session:StreamingSession.try_cache_finished_req",
    params=("req",),
    why="SGLang takes what is allocated for computed",
    until="a session keeps what was computed",
)
def _keeping_what_was_computed(original: Any, self: StreamingSession, req: Any) -> bool:
    """Let a session keep a turn's KV slots up to its last token, which has no KV yet.

    Upstream keeps every slot that is allocated. A round allocates more slots than it fills, plain decoding does not.
    """
    session = req.session
    known = len(req.origin_input_ids) + len(req.output_ids_through_stop)
    kept: bool = original(self, req)
    if kept and serves_ours():
        kv = self.slots[session.session_id].kv
        kv.kv_committed_len = min(kv.kv_committed_len, known - 1)
    return kept


def clear_turns(turns: dict[str, Any], rid: str | None) -> None:
    """Abort a session's turns that follow the turn `rid`, or all if it is None, and remove them from `turns`.

    SGLang deletes from the dictionary that it iterates over, and twice if two turns have one id, so its scheduler ends.
    """
    waiting = list(turns.values()) if rid is None else []
    if rid is not None and rid in turns:
        waiting, turns[rid].children = turns[rid].children, []
    while waiting:
        turn = waiting.pop()
        waiting += turn.children
        turn.children = []
        turn.abort()
        name = turn.req.rid
        if turns.get(name) is turn:
            del turns[name]

"""Every request's arrival, and every end of its KV, retraction and preemption included; SGLang reports neither to its
worker.

Its own hook covers finished requests only; `release_kv_cache` is the one function they all go through.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import ref

from sglang.srt.session.streaming_session import StreamingSession

from whiflash_sglang.engine.carried import serves_ours
from whiflash_sglang.engine.patching import around
from whiflash_sglang.engine.scheduler.overlap import behind_forward


class Owner(Protocol):
    """Keeper of something per request. leaving: whether there is something to flush."""

    @property
    def leaving(self) -> bool: ...

    def arrived(self, req: Any) -> None: ...

    def released(self, req: Any, *, kept: bool) -> None: ...

    def flush(self) -> None: ...


def nobody() -> None: ...  # before a worker is made


_owner: Callable[[], Any] = nobody
_runner: Callable[[], Any] = nobody
_save: Callable[[Any], None] | None = None
_together = False
"""Whether releases are flushed together: until the next batch is made nobody writes to the rows that they had."""


def notify(owner: Owner, runner: Any, save: Callable[[Any], None]) -> None:
    """Call `owner` on every arrival and release from now on, after the forwards of `runner`; neither is kept alive.

    save: called before a request gives its slots up whose KV waits on the host.
    """
    global _owner, _runner, _save
    _owner, _runner, _save = ref(owner), ref(runner), save


@around(
    "sglang.srt.mem_cache.common:release_kv_cache",
    params=("req", "tree_cache", "checkpoint"),
    why="a worker learns of finished requests only",
    until="it learns of every release",
    everywhere=True,
)
def _noting(original: Any, req: Any, tree_cache: Any, *, checkpoint: bool) -> None:
    """The worker hears of every end of a request's KV."""
    owner = _owner()
    if owner is not None and serves_ours():
        saved = req.kv.retraction_backup is not None  # by a decode server that retracts it
        # A session keeps the slots of a turn that is retracted, too.
        kept = checkpoint or saved or (req.session is not None and req.session.streaming)
        owner.released(req, kept=kept)
        if kept and (saved or not _together):
            flush()
        if saved and _save is not None:
            _save(req)
    original(req, tree_cache, checkpoint=checkpoint)


def arrived(req: Any) -> None:
    """A request has arrived."""
    owner = _owner()
    if owner is not None:
        owner.arrived(req)


@contextmanager
def together() -> Iterator[None]:
    """Flush requests that are released in the block at its end."""
    global _together
    _together = True
    try:
        yield
    finally:
        _together = False
        flush()


def flush() -> None:
    """Ingest what is parked of requests that were released, if there is anything."""
    owner, runner = _owner(), _runner()
    if owner is not None and runner is not None and owner.leaving:
        with behind_forward(runner):
            owner.flush()


@around(
    "sglang.srt.session.streaming_session:StreamingSession.try_cache_finished_req",
    params=("req",),
    why="SGLang takes what is allocated for computed",
    until="a session keeps what was computed",
)
def _keeping_what_was_computed(original: Any, self: StreamingSession, req: Any) -> bool:
    """A session keeps a turn's slots up to its last token, which no forward has seen.

    Upstream takes what is allocated for computed: true of plain decoding, which allocates no slot before it needs it.
    """
    session = req.session
    known = len(req.origin_input_ids) + len(req.output_ids_through_stop)
    kept: bool = original(self, req)
    if kept and serves_ours():
        kv = self.slots[session.session_id].kv
        kv.kv_committed_len = min(kv.kv_committed_len, known - 1)
    return kept

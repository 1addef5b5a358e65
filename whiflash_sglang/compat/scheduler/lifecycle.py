"""A request's beginning and end, told to everything that keeps something per row of the request table.

Every end of a request's KV, retraction and preemption included, of which SGLang tells no worker.

Its own hook covers finished requests only; `release_kv_cache` is the one function they all go through.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from weakref import ReferenceType, ref

from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache import common
from sglang.srt.session.streaming_session import StreamingSession

from whiflash_sglang.cache.tokens import StopTable, TokenTable
from whiflash_sglang.compat.carried import serves_ours
from whiflash_sglang.compat.forward import sampling
from whiflash_sglang.compat.http.streamer import recording_of
from whiflash_sglang.compat.patching import around, replace
from whiflash_sglang.compat.scheduler.grammars import grammar_of
from whiflash_sglang.compat.scheduler.overlap import behind_forward
from whiflash_sglang.core import SampleHook
from whiflash_sglang.device.transfers import Upload
from whiflash_sglang.drafters.base import Drafter, of_text
from whiflash_sglang.lookup.memory import tenant_of
from whiflash_sglang.metrics.publisher import Publisher
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.spans.hints import HintError, RequestHints, parse_hints
from whiflash_sglang.spans.prediction import ReadPrediction
from whiflash_sglang.telemetry.tally import Tally

logger = logging.getLogger(__name__)

MALFORMED = RequestHints()
"""In place of hints that could not be read."""


class Lifecycle:
    """Opens and closes what drafters, backlog, controller and tables keep of a request. Who is in `quarantine` is told
    only what to drop.
    """

    def __init__(
        self,
        drafters: Mapping[str, Drafter],
        sync: DraftSync,
        controller: Controller,
        tokens: TokenTable,
        stops: StopTable,
        read_prediction: ReadPrediction,
        *,
        hooks: Sequence[SampleHook] = (),
        sample_rate: float = 0.0,
        quarantine: Quarantine,
        tally: Tally,
        publisher: Publisher,
    ) -> None:
        self._read_prediction, self._hooks = read_prediction, hooks
        self._sample_rate = sample_rate
        self._drafters, self._sync, self._controller = of_text(drafters), sync, controller
        self._tokens, self._stops = tokens, stops
        self._quarantine, self._tally, self._publisher = quarantine, tally, publisher

    def begin(self, row: int, req: Any, upload: Upload) -> None:
        """A prefill of `req` into `row`: a request begins, or begins again after a retraction, or goes on (a chunk).

        What the device keeps of it goes there with `upload`.
        """
        # With output it was retracted: what its row still holds may be of before an earlier retraction.
        if not req.output_ids and self._controller.holds(row, req.rid):
            return
        hints, tenant = _hints_of(req), tenant_of(req.extra_key, req.cache_salt)
        if not req.output_ids:
            self._tally.requests["malformed" if hints is MALFORMED else hints.source] += 1
        predicted = self._predicted(req)
        self._quarantine.begin(req.rid, tenant)
        for arm, drafter in self._drafters.items():
            if self._quarantine.serves(arm, req.rid):
                with self._quarantine.guard(arm, req.rid):
                    drafter.begin(row, hints, tenant, predicted, grammar_of(req), len(req.origin_input_ids))
        recording = recording_of(req, hints.trace, self._sample_rate)
        self._controller.open(row, req.rid, hints, req.output_ids, recording)
        self._tokens.begin(upload, row, req.origin_input_ids, req.output_ids)
        self._stops.begin(upload, row, sampling.ending_ids(req))
        for hook in self._hooks:
            hook.begin(upload, row, req)

    def released(self, req: Any, *, kept: bool) -> None:
        """The request gives its slots up. Where the tree or a session keeps them what was parked is flushed first."""
        row = req.kv.req_pool_idx
        if row is None or not self._controller.holds(row, req.rid):
            return
        if kept:
            self._sync.leave(row, req.owned_kv_len())
        if kept and req.finished():
            for arm, drafter in self._drafters.items():
                if self._quarantine.serves(arm, req.rid):
                    with self._quarantine.guard(arm, req.rid):
                        drafter.finish(row, req.output_ids_through_stop)
        self._tally.ended(self._controller.states[row].counts)
        self._forget(row)
        if not self._controller.states:
            self._publisher.flush()

    @property
    def leaving(self) -> bool:
        """Whether requests were released whose slots lack what was parked."""
        return bool(self._sync.leaving)

    def flush(self) -> None:
        """What was parked of those that are released goes into the slots that they gave up."""
        self._sync.flush()

    def forget_all(self) -> None:
        """Every slot is free, so nothing that was parked has a home."""
        for row in list(self._controller.states):
            self._forget(row)

    def _predicted(self, req: Any) -> Sequence[int] | None:
        """What the request's caller expects back. Malformed: as of `_hints_of`."""
        try:
            read = self._read_prediction(req.sampling_params.custom_params)
        except HintError as error:
            logger.warning("request %s: a malformed prediction is ignored (%s)", req.rid, error)
            return None
        return read.tokens if read is not None and read.tokens else None

    def _forget(self, row: int) -> None:
        rid = self._controller.states[row].rid
        self._sync.forget(row)
        self._controller.forget(row)
        for arm, drafter in self._drafters.items():
            with self._quarantine.guard(arm, rid):
                drafter.release(row)
        self._quarantine.end(rid)


def _hints_of(req: Any) -> RequestHints:
    """The request's hints. HTTP refuses malformed ones; an embedded engine has no HTTP, so there they are dropped."""
    try:
        return parse_hints(req.sampling_params.custom_params)
    except HintError as error:
        logger.warning("request %s: malformed hints are ignored (%s)", req.rid, error)
        return MALFORMED


class Owner(Protocol):
    """Who keeps something per request. leaving: whether there is something to flush."""

    @property
    def leaving(self) -> bool: ...

    def released(self, req: Any, *, kept: bool) -> None: ...

    def flush(self) -> None: ...


_owner: ReferenceType[Any] | None = None
_runner: ReferenceType[Any] | None = None
_together = False
"""Whether releases are flushed together: until the next batch is made nobody writes to the rows that they had."""


def notify(owner: Owner, runner: Any) -> None:
    """`owner` is told of every release from now on, behind the forwards of `runner`; neither is kept alive."""
    global _owner, _runner
    _owner, _runner = ref(owner), ref(runner)


def install() -> None:
    """Idempotent."""
    replace(StreamingSession, "try_cache_finished_req", _keeping_what_was_computed)
    replace(Scheduler, "process_batch_result", _releasing_together)
    original = common.release_kv_cache
    replace(common, "release_kv_cache", _noting)
    for name, module in list(sys.modules.items()):
        # Modules that imported the function by name hold the original.
        if name.startswith("sglang.srt") and getattr(module, "release_kv_cache", None) is original:
            module.release_kv_cache = common.release_kv_cache  # type: ignore[attr-defined]


@around
def _noting(original: Any, req: Any, tree_cache: Any, *, checkpoint: bool) -> None:
    owner = _owner() if _owner is not None else None
    if owner is not None and serves_ours():
        # A session keeps the slots of a turn that is retracted, too.
        kept = checkpoint or (req.session is not None and req.session.streaming)
        owner.released(req, kept=kept)
        if kept and not _together:
            _flush()
    original(req, tree_cache, checkpoint=checkpoint)


@around
def _releasing_together(original: Any, self: Scheduler, batch: Any, result: Any) -> None:
    global _together
    _together = True
    try:
        original(self, batch, result)
    finally:
        _together = False
        _flush()


def _flush() -> None:
    owner = _owner() if _owner is not None else None
    runner = _runner() if _runner is not None else None
    if owner is not None and runner is not None and owner.leaving:
        with behind_forward(runner):
            owner.flush()


@around
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

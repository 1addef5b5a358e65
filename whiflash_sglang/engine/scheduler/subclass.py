"""Make SGLang's scheduler, in a server of ours, an instance of a subclass that uses SGLang's override points.

SGLang's registry of hooks replaces a class for all servers of a process, and swallows failures. So the instance changes
its class while it is made: when its worker and its caches are there, and before it makes the parts that we replace.
"""

from typing import Any

import msgspec
from sglang.srt.managers.io_struct import (
    EndWeightUpdateReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromIPCReqInput,
)
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from whiflash_sglang.engine.carried import is_ours
from whiflash_sglang.engine.forward.parallel import RequestReceiver
from whiflash_sglang.engine.forward.processors import take_over
from whiflash_sglang.engine.patching import around, become
from whiflash_sglang.engine.scheduler import releases
from whiflash_sglang.engine.scheduler.control import InternalState
from whiflash_sglang.engine.scheduler.disaggregation import PreallocQueue
from whiflash_sglang.engine.scheduler.figures import MetricsReporter
from whiflash_sglang.engine.scheduler.previews import PreviewQueue
from whiflash_sglang.engine.scheduler.radix import BigramTree
from whiflash_sglang.engine.scheduler.session_tree import MARK, SessionTracker, SessionTree
from whiflash_sglang.engine.scheduler.stops import BatchResultProcessor
from whiflash_sglang.engine.scheduler.streamer import OutputStreamer

WRITES = (UpdateWeightFromDiskReqInput, UpdateWeightsFromIPCReqInput, EndWeightUpdateReqInput)
"""Requests that write the target's weights, or end the writing of their parts."""


@around(
    "sglang.srt.managers.scheduler:Scheduler.emit_metrics_constants",
    why="SGLang's registry replaces the class for every server of a process, and swallows a hook that fails",
    until="an algorithm may name a subclass of `Scheduler`",
)
def _becoming(original: Any, self: Any) -> None:
    """Make a scheduler of ours a `WhiflashScheduler`. SGLang calls this once, when its metrics collector has its labels
    and the worker its memory.
    """
    original(self)
    if not is_ours(self):
        return
    become(self, type("WhiflashScheduler", (WhiflashScheduler, type(self)), {}))
    tree = self.tree_cache
    if type(tree) is UnifiedRadixCache:
        become(tree, BigramTree if tree.tree_core.is_eagle else SessionTree)
        become(tree.session_refs, SessionTracker)
    if self.metrics_collector is not None:
        self.draft_worker.publish_to(self.metrics_collector)


class WhiflashScheduler(PreviewQueue):
    """Our additions to SGLang's scheduler, whose class follows this one among the bases."""

    has_run = False
    """Whether a batch has run since the scheduler was idle."""

    def init_metrics_reporter(self: Any) -> None:
        super().init_metrics_reporter()  # type: ignore[misc]
        become(self.metrics_reporter, MetricsReporter)

    def init_request_receiver(self: Any) -> None:
        super().init_request_receiver()  # type: ignore[misc]
        become(self.request_receiver, RequestReceiver)

    def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
        return OutputStreamer

    def init_batch_result_processor(self: Any) -> None:
        super().init_batch_result_processor()  # type: ignore[misc]
        become(self.batch_result_processor, BatchResultProcessor)

    def init_disaggregation(self: Any) -> None:
        super().init_disaggregation()  # type: ignore[misc]
        if self.disagg_decode_prealloc_queue is not None:
            become(self.disagg_decode_prealloc_queue, PreallocQueue)

    def init_internal_state(self: Any) -> None:
        super().init_internal_state()  # type: ignore[misc]
        self.internal_state = InternalState(self, self.internal_state.record_step_time)

    def init_req_max_new_tokens(self: Any, req: Any) -> None:
        """Report an arriving request to the worker. SGLang calls this once a request, which has its session by then."""
        super().init_req_max_new_tokens(req)  # type: ignore[misc]
        self.draft_worker.stages.lifecycle.arrived(req)

    def process_input_requests(self: Any, recv_reqs: Any) -> None:
        """Report writes of the target's weights to the worker. Every process calls this in each pass of its loop."""
        super().process_input_requests(recv_reqs)  # type: ignore[misc]
        if any(isinstance(request, WRITES) for request in recv_reqs):
            self.draft_worker.target_written()

    def handle_generate_request(self: Any, recv_req: Any) -> None:
        """End the turns of a session that this request's turn replaces, before SGLang handles it."""
        asked = recv_req.session_params
        if asked is not None and asked.replace and asked.id in self.session_controller:
            session = self.session_controller.get(asked.id)
            if not session.streaming:
                releases.clear_turns(session.req_nodes, asked.rid)
        super().handle_generate_request(recv_req)  # type: ignore[misc]

    def close_session(self: Any, recv_req: Any) -> None:
        """Close the session of this id in the radix tree, and that of `/open_session`, whose id lacks the tenant."""
        tenant, _, session = recv_req.session_id.rpartition(MARK)
        if self.enable_session_radix_cache:
            self.tree_cache.release_radix_session(f"{tenant}{MARK}{session}")
            self.drop_preview(f"{tenant}{MARK}{session}")
        super().close_session(msgspec.structs.replace(recv_req, session_id=session))  # type: ignore[misc]

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        """Take over the logit processors of a request. SGLang calls this once its grammar is compiled."""
        take_over(req)
        super()._add_request_to_queue(req, is_retracted)  # type: ignore[misc]

    def abort_request(self: Any, recv_req: Any) -> None:
        """Abort only the request with this id. SGLang aborts all with this prefix, so others are renamed meanwhile."""
        decoding = self.disagg_decode_prealloc_queue
        queues = (self.disagg_prefill_bootstrap_queue, decoding, self.disagg_decode_transfer_queue)
        grammars, running = self.grammar_manager.grammar_queue, self.collect_inflight_reqs()
        held = [self.waiting_queue, self.previews.values(), grammars, running]
        held += [queue.queue for queue in queues if queue is not None]
        held += [self.disagg_prefill_inflight_queue or (), getattr(decoding, "retracted_queue", None) or ()]
        known = {getattr(one, "req", one) for reqs in held for one in reqs} | ({self.chunked_req} - {None})
        begins = {req for req in known if req.rid.startswith(recv_req.rid) and req.rid != recv_req.rid}
        others = () if recv_req.abort_all else begins
        for req in others:
            req.rid = f"\0{req.rid}"
        try:
            super().abort_request(recv_req)  # type: ignore[misc]
        finally:
            for req in others:
                req.rid = req.rid[1:]

    def update_running_batch(self, batch: Any) -> Any:
        """Switch off SGLang's own penalties of a running batch, since verifications count tokens elsewhere."""
        penalties = batch.sampling_info.penalizer_orchestrator
        if penalties.is_required:
            for penalizer in penalties.penalizers.values():
                penalizer.teardown()
            penalties.is_required = False
        return super().update_running_batch(batch)  # type: ignore[misc]

    def process_batch_result(self: Any, *args: Any, **named: Any) -> None:
        """Flush and count all requests that end here together. Nothing writes to their rows before the next batch."""
        self.has_run = True
        self.draft_worker.flushes_later = True
        try:
            super().process_batch_result(*args, **named)  # type: ignore[misc]
        finally:
            self.draft_worker.flushes_later = False
            releases.flush(self.draft_worker)
            self.draft_worker.stages.lifecycle.settle()

    def on_idle(self: Any) -> None:
        """Check our caches where SGLang checks its pools, but only once after the last batch."""
        if self.has_run and self.is_fully_idle():
            self.has_run = False
            self.draft_worker.stages.lifecycle.check_integrity()
        super().on_idle()  # type: ignore[misc]

    def is_fully_idle(self: Any, *args: Any, **named: Any) -> bool:
        """Whether nothing runs. Requests whose answers have left are put away first: SGLang does that in its next pass,
        and until then refuses to flush its cache, also for new weights.
        """
        batches = [batch for batch in (self.last_batch, self.running_batch) if batch is not None]
        if self.chunked_req is None and all(req.finished() for batch in batches for req in batch.reqs):
            while self.result_queue:
                self.process_batch_result(*self.result_queue.popleft())
            self.running_batch.filter_batch()
            self.running_batch.batch_is_full, self.last_batch = False, None
        return bool(super().is_fully_idle(*args, **named))  # type: ignore[misc]

"""Prefill previews, what is known of a session's next prompt while its tool runs, at the lowest priority.

A preview gets no answer. It waits apart from SGLang's queue, and runs only if that is empty, no prompt is prefilled in
chunks and no grammar is compiled. Beside running requests it takes neither the last row nor KV that they may need. Its
KV belongs to no session: it is evicted before the KV of open sessions, until the session's next request takes it over.

Without running requests SGLang prefills a preview to its end in chunks, and a request that arrives ends it. Beside
running requests a preview is cut to a fixed size, and prices decide how many rounds later the next one may run. All
ranks count the same rounds by the same prices, so they agree.
"""

from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.common import match_kv_cache

from whiflash_sglang.engine.scheduler.session_tree import surplus
from whiflash_sglang.spans.hints import HintError, parse_hints

SHARE = 0.01
"""Largest share of the running requests' time that previews take, by the prices of the start."""
BESIDE, ALONE = 512, 2048
"""Most new tokens of a preview's forward, beside running requests and without any: an arriving request waits for it."""
LEAST = 16
"""Fewest new tokens that are worth a forward of their own."""
MOST_WAITING = 64
"""Largest number of previews that wait."""


def is_preview(req: Any) -> bool:
    """Whether a request of SGLang's is a preview, which the HTTP process has made of it (`http/previews.py`)."""
    if req is None or req.sampling_params.max_new_tokens:
        return False
    try:
        return parse_hints(req.sampling_params.custom_params).preview is not None
    except HintError:  # the request asks for no token, but by hints that nobody has checked
        return False


class PreviewQueue:
    """The part of our scheduler that holds previews, the newest of each session, and admits them to prefills."""

    previews: dict[str, Any]
    """Waiting requests by the scheduler's id of their sessions; the first runs next."""
    rounds_to_wait: float
    """Rounds of running requests before the next preview beside them."""

    def init_request_receiver(self) -> None:
        super().init_request_receiver()  # type: ignore[misc]
        self.previews, self.rounds_to_wait = {}, 0.0

    def handle_generate_request(self: Any, recv_req: Any) -> None:
        """Handle a request as SGLang does, but abort a preview of a closed session, which SGLang would open again."""
        is_late = self.enable_session_radix_cache and is_preview(recv_req)
        if is_late and recv_req.session_id in self.tree_cache.session_refs._closed_session_ids:
            self.send_abort_output(AbortReq(rid=recv_req.rid), recv_req)
            self._dropped(1)
        else:
            super().handle_generate_request(recv_req)  # type: ignore[misc]

    def _add_request_to_queue(self: Any, req: Any, is_retracted: bool = False) -> None:
        """Set a preview apart, or end a retracted one. Another request ends its session's and the prefilled one."""
        session, waits = req.session_id, req.session_id is not None and is_preview(req)
        if req.retracted_stain and is_preview(req):  # it was set apart before, and its first tokens may stay cached
            self._release_aborted_request(req)
            self.send_abort_output(AbortReq(rid=req.rid), req)
            req.finished_reason, req.finished_output = FINISH_ABORT(), True  # under overlap its result comes later
            return
        self.drop_preview(session)
        if waits:
            req.priority = None  # SGLang fills in the lowest; `--default-priority-value` may be above others
        elif is_preview(self.chunked_req):
            self.abort_request(AbortReq(rid=self.chunked_req.rid))
        super()._add_request_to_queue(req, is_retracted)  # type: ignore[misc]
        if not waits or req not in self.waiting_queue:  # SGLang has refused it
            return
        self.waiting_queue.remove(req)
        req.session_id, self.previews[session] = None, req
        if len(self.previews) > MOST_WAITING:
            self.drop_preview(surplus([*self.previews]))

    def _arm_prefill_decode_interval(self: Any, batch: Any) -> None:
        """Count the tokens of a preview's prefill, after which `--prefill-decode-interval` makes no prompt wait."""
        if batch is not None and batch.forward_mode.is_extend() and all(map(is_preview, batch.reqs)):
            self.draft_worker.tally.preview_tokens += batch.extend_num_tokens
        else:
            super()._arm_prefill_decode_interval(batch)  # type: ignore[misc]

    def drop_preview(self: Any, session: str | None) -> None:
        """Answer the session's waiting preview, if any, as aborted."""
        if session in self.previews:
            self.abort_request(AbortReq(rid=self.previews[session].rid))

    def abort_request(self: Any, recv_req: AbortReq) -> None:
        """Abort requests as SGLang does, waiting previews included."""
        waiting = self.previews
        self.waiting_queue += waiting.values()
        super().abort_request(recv_req)  # type: ignore[misc]
        self.previews = {session: req for session, req in waiting.items() if req in self.waiting_queue}
        self._dropped(len(waiting) - len(self.previews))
        self.waiting_queue = [req for req in self.waiting_queue if req not in waiting.values()]

    def _dropped(self: Any, count: int) -> None:
        """Count previews that were dropped, and publish the count if no round will."""
        self.draft_worker.tally.previews["dropped"] += count
        if count and not self.draft_worker.controller.states:
            self.draft_worker.publisher.flush()

    def update_running_batch(self, batch: Any) -> Any:
        self.rounds_to_wait -= 1
        return super().update_running_batch(batch)  # type: ignore[misc]

    def get_new_batch_prefill(self: Any, running_batch: Any) -> Any:
        """Return SGLang's plan of a prefill; if it plans none, one for the first preview, if that has room."""
        plan = self._plan(running_batch, ALONE if is_preview(self.chunked_req) else None)
        busy = self.waiting_queue or self.chunked_req is not None or self.grammar_manager.has_waiting_grammars()
        if plan.batch_to_run is not None or not self.previews or busy:
            return plan
        # Under overlap scheduling a preview stays in the running batch until its result is read.
        batch, running = plan.running_batch, [r for r in plan.running_batch.reqs if r.sampling_params.max_new_tokens]
        rows = self.get_num_allocatable_reqs(len(batch.reqs), running_batch=batch)
        if running and (batch.batch_is_full or rows < 2 or self.rounds_to_wait > 0):
            return plan
        session, req = next(iter(self.previews.items()))
        match_kv_cache(req, self.tree_cache)
        prompt, cached = req.origin_input_ids, req.num_matched_prefix_tokens
        if len(prompt) - cached < LEAST:
            self.drop_preview(session)
            return plan
        most = min(BESIDE if running else ALONE, self.chunked_prefill_size or ALONE)
        if running or not self.chunked_prefill_size:
            req.origin_input_ids = prompt[: cached + most]
        self.waiting_queue.append(req)
        plan = self._plan(batch, None if running else ALONE)
        del self.previews[session]
        if plan.batch_to_run is not None:
            self.draft_worker.tally.previews["prefilled"] += 1
        else:  # the KV is for the running requests or in open sessions, or storage is still being read
            self.waiting_queue.remove(req)
            batch.batch_is_full, req.origin_input_ids, self.previews[session] = False, prompt, req
            if not batch.reqs and self.tree_cache.check_prefetch_progress(req.cache_request_handle):
                self.drop_preview(session)  # nothing ends that would give it room
        if running:
            self.rounds_to_wait = self._rounds(min(most, len(prompt) - cached), cached, running)
        return plan

    def _plan(self: Any, batch: Any, most: int | None) -> Any:
        """Return SGLang's plan of a prefill, in chunks of up to `most` tokens if the server prefills in chunks."""
        size = self.chunked_prefill_size
        self.chunked_prefill_size = min(size, most) if size and most else size
        plan = super().get_new_batch_prefill(batch)  # type: ignore[misc]
        self.chunked_prefill_size = size
        return plan

    def _rounds(self: Any, tokens: int, cached: int, running: list[Any]) -> float:
        """Return how many plain rounds take 1 / `SHARE` times as long as a prefill (`tokens` after `cached`)."""
        tables, context = self.draft_worker.controller.costs.tables, sum(req.seqlen for req in running)
        prefill = tables.verify(tokens, 1, cached) + sum(tables.catch(arm, tokens) for arm in tables.catch_up)
        return float(prefill / tables.verify(len(running), len(running), context) / SHARE)

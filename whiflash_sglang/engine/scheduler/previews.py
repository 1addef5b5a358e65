"""Prefill previews, what is known of a session's next prompt while its tool runs, at the lowest priority.

A preview gets no answer, and waits apart from SGLang's queue, so it counts in none of its limits. It runs in a pass in
which no other request waits, is chunked, or needs the last row, and takes no KV that running requests may need. Its KV
belongs to no session: it is evicted before the KV of open sessions, until the session's next request takes it over.

Prices decide how often one runs beside other requests: a prefill of as many tokens as rounds of 1 % of their time pay
for. Rank 0 has the price, and all ranks count the same rounds, so they agree.
"""

from collections import Counter
from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.mem_cache.common import match_kv_cache

from whiflash_sglang.engine.scheduler.session_tree import MARK
from whiflash_sglang.spans.hints import HintError, parse_hints

SHARE = 0.01
"""Largest share of the running requests' time that previews take."""
BESIDE, ALONE = 512, 2048
"""Most new tokens of one preview, beside running requests and without any: a request that arrives meanwhile waits."""
LEAST = 16
"""Fewest new tokens that are worth a forward of their own."""
MOST = 64
"""Largest number of previews that wait."""


def is_preview(req: Any) -> bool:
    """Whether a request of SGLang's is a preview, which the HTTP process has made of it (`http/previews.py`)."""
    if req.sampling_params.max_new_tokens or req.session_id is None:
        return False
    try:
        return parse_hints(req.sampling_params.custom_params).preview is not None
    except HintError:  # the request asks for no token, but by hints that nobody has checked
        return False


class PreviewQueue:
    """The part of our scheduler that holds previews, the newest of each session, and admits them to prefills."""

    previews: dict[str, Any]
    """Requests by the scheduler's id of their sessions, the oldest first."""
    rest: float
    """Rounds of running requests before the next preview beside them."""
    draft_worker: Any

    def init_request_receiver(self) -> None:
        super().init_request_receiver()  # type: ignore[misc]
        self.previews, self.rest = {}, 0.0

    def _add_request_to_queue(self: Any, req: Any, is_retracted: bool = False) -> None:
        """Hold a preview; queue another request, and drop its session's preview, which would come too late."""
        session, held = req.session_id, is_preview(req)
        self.drop_preview(session)
        if not held:
            super()._add_request_to_queue(req, is_retracted)  # type: ignore[misc]
            return
        req.session_id, self.previews[session] = None, req
        if len(self.previews) > MOST:  # the oldest of the tenant that has the most
            sizes = Counter(name.rpartition(MARK)[0] for name in self.previews)
            largest = max(sizes, key=sizes.__getitem__)
            self.drop_preview(next(name for name in self.previews if name.rpartition(MARK)[0] == largest))

    def drop_preview(self: Any, session: str | None) -> None:
        """Answer the session's waiting preview, if any, as aborted."""
        if session in self.previews:
            self.abort_request(AbortReq(rid=self.previews[session].rid))

    def abort_request(self: Any, recv_req: AbortReq) -> None:
        """Abort requests as SGLang does, waiting previews included."""
        held, queue = self.previews, self.waiting_queue
        queue += held.values()
        super().abort_request(recv_req)  # type: ignore[misc]
        left = set(queue)
        self.previews = {session: req for session, req in held.items() if req in left}
        queue[:] = [req for req in queue if req not in held.values()]

    def update_running_batch(self, batch: Any) -> Any:
        self.rest -= 1
        return super().update_running_batch(batch)  # type: ignore[misc]

    def get_new_batch_prefill(self: Any, running_batch: Any) -> Any:
        """Return SGLang's plan of a prefill; if it plans none, one for the oldest preview, if that has room."""
        plan = super().get_new_batch_prefill(running_batch)  # type: ignore[misc]
        batch, beside = plan.running_batch, len(plan.running_batch.reqs)
        if plan.batch_to_run is not None or not self.previews or self.waiting_queue or self.chunked_req is not None:
            return plan
        rows = self.get_num_allocatable_reqs(beside, running_batch=batch)
        if beside and (batch.batch_is_full or rows < 2 or self.rest > 0):
            return plan
        session, req = next(iter(self.previews.items()))
        match_kv_cache(req, self.tree_cache)
        tokens = len(req.origin_input_ids) - req.num_matched_prefix_tokens
        if tokens < LEAST:
            self.drop_preview(session)
            return plan
        most = min(BESIDE if beside else ALONE, *([self.chunked_prefill_size] if self.chunked_prefill_size else []))
        req.origin_input_ids = req.origin_input_ids[: req.num_matched_prefix_tokens + most]
        super()._add_request_to_queue(req)  # type: ignore[misc]
        plan = super().get_new_batch_prefill(batch)  # type: ignore[misc]
        del self.previews[session]
        if plan.batch_to_run is None and req in self.waiting_queue:
            self.waiting_queue.remove(req)
            batch.batch_is_full, self.previews[session] = False, req
            if not beside:  # it never fits
                self.drop_preview(session)
        if beside:
            verify = self.draft_worker.controller.costs.tables.verify
            self.rest = self.draft_worker.ranks.broadcast(  # each rank has measured prices of its own
                lambda: verify(min(tokens, most), beside, 0) / verify(beside, beside, 0) / SHARE
            )
        return plan

"""Serve prompts that one server computes and another continues (`--disaggregation-mode`).

A prefill server sends drafters' KV after the target's. A decode server has no prefills: its requests begin when SGLang
asks for the first draft input. The last feature does not travel, so drafters that begin with it wait a round.

SGLang pairs sent and received buffers by position, so both servers need the same drafters. A prefill server registers
the layout of its draft KV in SGLang's field for layouts of KV.
"""

from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.decode import DecodePreallocQueue
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.overlap_utils import FutureMap, RelayPayload
from sglang.srt.runtime_context import get_disagg

from whiflash_sglang.engine.patching import around
from whiflash_sglang.engine.scheduler.releases import our_worker, slots_of
from whiflash_sglang.engine.scheduler.spec_worker import DraftInput


def prefills_only() -> bool:
    """Whether this is a prefill server, where requests end with their first token."""
    return bool(get_disagg().disaggregation_mode == "prefill")


def draft_input(batch: Any, bonus: Any, future_map: FutureMap) -> DraftInput:
    """Return the input of the first round of a decode server's batch. bonus: [B] int64, each request's first token."""
    worker = our_worker()
    assert worker is not None, "requests came before the worker was made"
    for req in batch.reqs:
        copy = req.__dict__.pop("_whiflash_kv", None)  # saved when it was retracted
        if copy is not None:
            worker.primary_draft_kv_pool.load_cpu_copy(copy, slots_of(worker, req))
    worker.adopt(batch)
    made = DraftInput(bonus, batch.seq_lens)
    if batch.enable_overlap:
        made.future_indices = batch.req_pool_indices
        future_map.publish(made.future_indices, batch.seq_lens)
        future_map.stash(made.future_indices, RelayPayload(bonus_tokens=bonus))
    return made


@around(
    "sglang.srt.disaggregation.common.conn:CommonKVManager._register_topology_row",
    params=("payload",),
    why="a prefill server registers nothing of its drafters",
    until="a worker may name what its KV depends on",
)
def _with_layout(original: Any, self: Any, url: str, payload: Any) -> None:
    """Register the name of a prefill server's draft KV layout (`layout_of`) in SGLang's field for KV layouts."""
    worker = our_worker()
    if worker is not None and worker.draft_layout is not None:
        payload = {**payload, "kv_layout": worker.draft_layout}
    original(self, url, payload)


class PreallocQueue(DecodePreallocQueue):  # type: ignore[misc]
    """SGLang's queue, which ends a request with an error if its prefill server's KV cannot be continued here."""

    def add(self, req: Any, is_retracted: bool = False, is_rebootstrap: bool = False) -> None:
        """Queue a request, aborted if its bootstrap room is another one's whose KV has not arrived (sglang #40125)."""
        late = (waiting for waiting, *_ in self.transfer_queue._deferred_releases)
        rooms = {w.req.bootstrap_room for w in (*self.queue, *self.transfer_queue.queue, *late)}
        again = is_retracted or is_rebootstrap or req.bootstrap_host == FAKE_BOOTSTRAP_HOST
        if not again and req.bootstrap_room in rooms:
            req.set_finish_with_abort(f"bootstrap_room: {req.bootstrap_room} is another request's; give a free one")
        super().add(req, is_retracted, is_rebootstrap)

    def _init_receiver(self, decode_req: Any, prefill_dp_rank: int) -> None:
        receiver, manager = decode_req.kv_receiver, self.kv_manager
        address, worker = receiver.bootstrap_addr, self.scheduler.draft_worker
        info = manager.prefill_info_table.get(address)
        reason = None if info is None else mismatch(worker, info, manager.attn_tp_size, address)
        if reason is None:
            super()._init_receiver(decode_req, prefill_dp_rank)
            return
        # The prefill server's record stays, since asking that server again would block the scheduler's loop. If it is
        # restarted, it misses heartbeats, and SGLang drops the record.
        manager.record_failure(receiver.bootstrap_room, reason)
        manager.update_status(receiver.bootstrap_room, KVPoll.Failed)
        receiver.conclude_state = KVPoll.Failed


def mismatch(worker: Any, info: Any, ranks: int, address: str) -> str | None:
    """Return why a prefill server's KV cannot be continued here; None if it can.

    Args:
        info: SGLang's record of that server. ranks: number of this server's that attend together. address: of its
            registration.
    """
    if info.kv_layout != worker.draft_layout:
        return (
            f"the prefill server {address} sends KV of the layout {info.kv_layout or 'of plain SGLang'}, and this "
            f"decode server reads {worker.draft_layout or 'that of plain SGLang'}; start both with WHIFLASH, the same "
            "drafters and the same --swa-full-tokens-ratio"
        )
    if info.attn_tp_size != ranks and worker.primary_draft_kv_pool is not None:
        return (
            f"ranks that attend together: {info.attn_tp_size} of the prefill server {address}, {ranks} of this decode "
            "server. Each has whole drafters, and SGLang would cut their KV by heads; give both the same --tp-size and "
            "DP attention, or --whiflash-drafters none"
        )
    return None

"""Requests whose prompt another server computed (`--disaggregation-mode decode`).

Their KV arrives and no prefill of this server sees them, so they begin where SGLang asks for the first draft input.
"""

from typing import Any
from weakref import ref

from sglang.srt.managers.overlap_utils import FutureMap, RelayPayload

from whiflash_sglang.compat.scheduler.spec_worker import DraftInput

_worker: ref[Any] | None = None


def notify(worker: Any) -> None:
    """Call `worker.adopt` with every batch of such requests from now on; it is not kept alive."""
    global _worker
    _worker = ref(worker)


def draft_input(batch: Any, bonus: Any, future_map: FutureMap) -> DraftInput:
    """What the first round of the batch's requests reads. bonus: [B] int64, the first token of each."""
    worker = _worker() if _worker is not None else None
    assert worker is not None, "requests came before the worker was made"
    worker.adopt(batch)
    made = DraftInput(bonus, batch.seq_lens)
    if batch.enable_overlap:
        made.future_indices = batch.req_pool_indices
        future_map.publish(made.future_indices, batch.seq_lens)
        future_map.stash(made.future_indices, RelayPayload(bonus_tokens=bonus))
    return made

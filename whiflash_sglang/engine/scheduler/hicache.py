"""Copy draft KV with the target's to host memory and storage (`--enable-hierarchical-cache`).

To SGLang the drafters' pool (`DraftPool`) is a sidecar: copied with the target's pages, loaded before the target's last
layer, and required of every page that storage offers.
"""

from typing import Any

from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_memory
from sglang.srt.speculative.base_spec_worker import HiCacheDraftMode, HiCacheDraftPlan

from whiflash_sglang.engine.patching import around
from whiflash_sglang.engine.scheduler.draft_pool import DraftPool
from whiflash_sglang.engine.scheduler.releases import flush, our_worker


def plan(pool: DraftPool | None) -> HiCacheDraftPlan:
    """Return SGLang's plan with the pool to copy beside the target's KV; empty without a host tier or draft KV."""
    if pool is None or not get_memory().enable_hierarchical_cache:
        return HiCacheDraftPlan()
    return HiCacheDraftPlan(HiCacheDraftMode.SIDECAR, (pool,))


@around(
    "sglang.srt.managers.cache_controller:HiCacheController.start_writing",
    why="SGLang submits copies of slots whose drafters' KV is not whole yet",
    until="SGLang asks its worker before it copies",
)
def _flushing_first(original: Any, self: HiCacheController) -> None:
    """Ingest the parked features of requests that ended before SGLang submits copies to the host. All copies are
    submitted here, also those of slots that were released a moment ago.
    """
    worker = our_worker()
    if self.write_queue and worker is not None:
        flush(worker)
    original(self)


@around(
    "sglang.srt.managers.cache_controller:storage_model_name",
    params=("model_name", "host_pool"),
    why="storage is keyed by the target alone",
    until="a sidecar names what its pages depend on",
)
def _of_these_drafters(original: Any, model_name: str | None, host_pool: Any) -> str | None:
    """Append the name of this server's KV layout to the model name by which HiCache keys its storage.

    Storage outlives the server. Other drafters would read this server's draft KV, a server without drafters has keys of
    another kind, and one whose windowed layers have a pool of their own stores other pages.
    """
    name: str | None = original(model_name, host_pool)
    worker = our_worker()
    if worker is None or worker.draft_layout is None or not get_memory().enable_hierarchical_cache:
        return name
    return f"{name}-{worker.draft_layout}" if name else str(worker.draft_layout)


@around(
    "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.write_backup_storage",
    params=("node_id",),
    why="SGLang stores every page",
    until="a sidecar may decline a page",
)
def _while_whole(original: Any, self: UnifiedRadixCache, node_id: Any) -> None:
    """Store nothing once a drafter is quarantined: its KV gets holes, and the next server would draft with it."""
    worker = our_worker()
    if worker is None or not any(arm in worker.quarantine for arm in worker.kv_arms):
        original(self, node_id)

"""Draft KV follows the target's into host memory and storage (`--enable-hierarchical-cache`).

To SGLang all drafters' KV is one more pool at the target's slots (`DraftPool`), a sidecar: copied with the target's
pages, loaded before the target's last layer, and required of every page that storage offers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_memory
from sglang.srt.speculative.base_spec_worker import HiCacheDraftMode, HiCacheDraftPlan

from whiflash_sglang.cache.tokens import DraftKV
from whiflash_sglang.compat.carried import serves_ours
from whiflash_sglang.compat.launch.refusals import has_windows
from whiflash_sglang.compat.patching import around
from whiflash_sglang.compat.scheduler import releases
from whiflash_sglang.drafters.base import KVDrafter
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.learn.swap import fingerprint


class DraftPool(MHATokenToKVPool):  # type: ignore[misc]
    """All drafters' layers, one after the other, over the tensors that the drafters hold.

    Args:
        target: the target's pool, whose slots it shares. kvs: of the drafters, by arm. layers: of the target, with
            each of which one of the drafters' is loaded.

    Raises:
        ConfigError: SGLang's host pool cannot hold them.
    """

    def __init__(self, target: Any, kvs: Mapping[str, DraftKV], layers: int) -> None:
        shapes = {arm: tuple(kv.k.shape[2:]) for arm, kv in kvs.items()}
        if len(set(shapes.values())) != 1:
            told = ", ".join(
                f"{arm!r} has {heads} heads of {width}" for arm, (heads, width) in shapes.items()
            )
            raise ConfigError(
                "--enable-hierarchical-cache keeps one host pool for all drafters, but their KV differs in shape "
                f"({told}); remove it, or one of the drafters"
            )
        self._k = [layer for kv in kvs.values() for layer in kv.k.unbind(0)]
        self._v = [layer for kv in kvs.values() for layer in kv.v.unbind(0)]
        if len(self._k) > layers:
            raise ConfigError(
                "--enable-hierarchical-cache loads one layer of the drafters with each of the target's, but the target "
                f"has {layers} and the drafters have {len(self._k)}; remove it, or one of the drafters"
            )
        first = self._k[0]
        heads, width = first.shape[1:]
        super().__init__(
            target.size,
            target.page_size,
            first.dtype,
            heads,
            width,
            len(self._k),
            str(first.device),
            enable_memory_saver=False,
            enable_alt_stream=False,
            kv_cache_layout="nhd",
            allocation_label="drafters",
        )

    def _create_buffers_normal(self) -> None:
        self.k_buffer, self.v_buffer = self._k, self._v


_namespace: str | None = None
_whole: Callable[[], bool] | None = None


def plan(target: Any, drafters: Mapping[str, KVDrafter], ingests: Callable[[str], bool]) -> HiCacheDraftPlan:
    """The pools that SGLang copies beside the target's KV: none without a host tier, or without drafters with KV.

    Args:
        target: the wrapped target. drafters: by arm. ingests: whether an arm's KV has no holes.
    """
    global _namespace, _whole
    _namespace = _whole = None
    if not get_memory().enable_hierarchical_cache:
        return HiCacheDraftPlan()
    # A page of the target has all layers, or those without windows: a server of the other kind must not read it.
    two_pools = isinstance(target.runner.token_to_kv_pool, BaseSWAKVPool)
    if not drafters:
        if not two_pools and has_windows(target.runner.model_config):
            _namespace = "whiflash-one-pool"  # plain SGLang's have two
        return HiCacheDraftPlan()
    kvs = {arm: drafter.kv for arm, drafter in drafters.items()}
    pool = DraftPool(target.runner.token_to_kv_pool, kvs, target.shape.num_layers)
    models = {arm: getattr(drafter, "model") for arm, drafter in drafters.items()}  # noqa: B009  (each has one)
    _namespace = f"whiflash-{fingerprint(models)}{'-two-pools' if two_pools else ''}"
    _whole = partial(_all_ingest, tuple(kvs), ingests)
    return HiCacheDraftPlan(HiCacheDraftMode.SIDECAR, (pool,))


def _all_ingest(arms: Sequence[str], ingests: Callable[[str], bool]) -> bool:
    return all(map(ingests, arms))


@around(
    "sglang.srt.managers.cache_controller:HiCacheController.start_writing",
    why="SGLang submits copies of slots whose drafters' KV is not whole yet",
    until="SGLang asks its worker before it copies",
)
def _flushing_first(original: Any, self: HiCacheController) -> None:
    """All copies to the host are submitted here, also those of slots that were released a moment ago: what is parked
    of these is ingested first.
    """
    if self.write_queue and serves_ours():
        releases.flush()
    original(self)


@around(
    "sglang.srt.managers.cache_controller:storage_model_name",
    params=("model_name", "host_pool"),
    why="storage is keyed by the target alone",
    until="a sidecar names what its pages depend on",
)
def _of_these_drafters(original: Any, model_name: str | None, host_pool: Any) -> str | None:
    """Storage is keyed by the drafters, too.

    It outlives the server. Another pair would read this one's draft KV, a server without drafters has keys of another
    kind, and one whose windowed layers have a pool of their own other pages.
    """
    name: str | None = original(model_name, host_pool)
    if _namespace is None or not serves_ours():
        return name
    return f"{name}-{_namespace}" if name else _namespace


@around(
    "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.write_backup_storage",
    params=("node_id",),
    why="SGLang stores every page",
    until="a sidecar may decline a page",
)
def _while_whole(original: Any, self: UnifiedRadixCache, node_id: Any) -> None:
    """Nothing is stored once a drafter's KV has holes: here it drafts no more, but the next server's would."""
    if _whole is None or not serves_ours() or _whole():
        original(self, node_id)

"""Let SGLang copy draft KV with the target's: to host memory and back, and from a prefill server to a decode server. To
SGLang all drafters' KV is one more pool at the target's slots.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_disagg, get_memory

from whiflash_sglang.arms.base import KVDrafter
from whiflash_sglang.cache.tokens import DraftKV
from whiflash_sglang.engine.launch.refusals import has_windows
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats.choice import TargetsParts

COPYING = "--enable-hierarchical-cache and --disaggregation-mode"


class DraftPool(MHATokenToKVPool):  # type: ignore[misc]
    """A pool of SGLang's over the KV tensors of all drafters, whose layers follow one another.

    Args:
        target: the target's pool, whose slots it shares. kvs: the drafters' KV, by arm. layers: number of the target's;
            with each of them SGLang loads one of the drafters' from the host.

    Raises:
        ConfigError: one pool of SGLang's cannot hold them.
    """

    def __init__(self, target: Any, kvs: Mapping[str, DraftKV], layers: int) -> None:
        shapes = {arm: tuple(kv.k.shape[2:]) for arm, kv in kvs.items()}
        if len(set(shapes.values())) != 1:
            told = ", ".join(f"{arm!r} has {heads} heads of {width}" for arm, (heads, width) in shapes.items())
            raise ConfigError(
                f"{COPYING} copy all drafters' KV as one pool, but it differs in shape ({told}); remove them, or one "
                "of the drafters"
            )
        self._k = [layer for kv in kvs.values() for layer in kv.k.unbind(0)]
        self._v = [layer for kv in kvs.values() for layer in kv.v.unbind(0)]
        if len(self._k) > layers:
            raise ConfigError(
                f"{COPYING} copy one layer of the drafters with each of the target's, but the target has {layers} and "
                f"the drafters have {len(self._k)}; remove them, or one of the drafters"
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
        views = ([layer.view(self.store_dtype) for layer in layers] for layers in (self._k, self._v))
        self.k_buffer, self.v_buffer = views


def copies_kv() -> bool:
    """Whether KV of this server is copied: to host memory, or between a prefill and a decode server."""
    return bool(get_memory().enable_hierarchical_cache or get_disagg().disaggregation_mode != "null")


def pool_of(target: Any, drafters: Mapping[str, KVDrafter]) -> DraftPool | None:
    """Return the pool to copy beside the target's; None if no KV is copied or no drafter has KV."""
    if not drafters or not copies_kv():
        return None
    kvs = {arm: drafter.kv for arm, drafter in drafters.items()}
    return DraftPool(target.runner.token_to_kv_pool, kvs, target.shape.num_layers)


def layout_of(target: Any, drafters: Mapping[str, KVDrafter]) -> str | None:
    """Return the name of the layout of copied KV: servers of equal names can read each other's copies.

    None if plain SGLang can read them, or if no KV is copied.
    A page has the drafters' KV, and that of all layers of the target or of those without windows.
    """
    if not copies_kv():
        return None
    two_pools = isinstance(target.runner.token_to_kv_pool, BaseSWAKVPool)
    if not drafters:
        # Plain SGLang has two pools for a target with windows.
        return "whiflash-one-pool" if not two_pools and has_windows(target.runner.model_config) else None
    models = {arm: drafter.model for arm, drafter in drafters.items()}
    narrow = sorted({str(drafter.kv_dtype) for drafter in drafters.values() if drafter.kv_dtype.itemsize == 1})
    return "-".join(["whiflash", _digest(models), *narrow, *(["two-pools"] if two_pools else [])])


def _digest(models: Mapping[str, TargetsParts]) -> str:
    """Return a digest of drafters by arm. Draft KV is interchangeable between drafters with equal digests.

    It covers all weights of a drafter, and not the parts of the target, whose storage SGLang keys itself.
    """
    digest = blake2b(digest_size=8)
    for arm, model in models.items():
        digest.update(f"{arm} {type(model).__name__} {model.config}".encode())
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name not in ("target_embedding", "target_lm_head"):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()

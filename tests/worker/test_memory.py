"""What the KV pool is sized by: the drafters' share of it, and nothing of ours for an engine that is not ours."""

from typing import Any

import torch
from engine import Engine, engine
from model_set import Models

BUDGET = 8 * 2**20


def pool_tokens(e: Engine, budget: int = BUDGET) -> int:
    """KV slots that SGLang makes of a budget of bytes for this engine."""
    from sglang.srt.model_executor import pool_configurator

    kvc = e.scheduler.tp_worker.model_runner.kv_cache_configurator
    sizes = pool_configurator.create_memory_pool_configurator(kvc).calculate_pool_sizes(budget, page_size=1)
    return int(sizes.max_total_num_tokens)


def taken(*tensors: torch.Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def layout(e: Engine) -> tuple[Any, ...]:
    """What our hooks would change of an engine."""
    row = e.scheduler.req_to_token_pool.req_to_token.shape[1]
    return pool_tokens(e), row, e.scheduler.tree_cache.tree_core.is_eagle


def test_the_pool_leaves_room_for_what_the_drafters_allocate(models: Models) -> None:
    """Of the tensors that exist in the end: as many slots as fit beside the rings and the texts, and not one more."""
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        target = e.scheduler.tp_worker.model_runner.token_to_kv_pool
        drafts = [d.kv for d in e.worker.drafters.values() if d.keeps_kv]
        slots = target.k_buffer[0].shape[0]
        all_kv = taken(*target.k_buffer, *target.v_buffer, *(t for kv in drafts for t in (kv.k, kv.v)))
        rings = e.worker.sync.rings.rings
        kept = [*vars(rings).values(), e.worker.tokens.data, e.worker.sync.watermarks.device]
        fixed = taken(*(t for t in kept if isinstance(t, torch.Tensor)))
        per_slot, rest = divmod(all_kv, slots)
        assert (len(drafts), rest) == (2, 0)
        assert pool_tokens(e) == (BUDGET - fixed) // per_slot


def test_an_engine_after_ours_is_as_it_was_before(models: Models) -> None:
    with engine(models.target) as e:
        before = layout(e)
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        assert all(ours != plain for ours, plain in zip(layout(e), before, strict=True))
    with engine(models.target) as e:
        assert layout(e) == before
        assert e.generate([[1, 2, 3]], max_new_tokens=4)
        e.check_leaks()

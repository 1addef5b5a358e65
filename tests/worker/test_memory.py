"""Sizes behind the KV pool's: the drafters' share of it, and nothing of ours for an engine that is not ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine, engine
from held import tensors_of
from model_set import Models
from test_rehearsal import peak_bytes

from whiflash_sglang.arms.base import KVDrafter
from whiflash_sglang.arms.paged import LOGIT_BYTES
from whiflash_sglang.formats import choice
from whiflash_sglang.serve.worker import WhiFlashWorker

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
    """Layout of an engine that our hooks would change."""
    row = e.scheduler.req_to_token_pool.req_to_token.shape[1]
    return pool_tokens(e), row, e.scheduler.tree_cache.tree_core.is_eagle


def reached(worker: Any) -> dict[int, int]:
    """Every tensor that the worker holds, whatever holds it, by its memory's address: bytes of that memory."""
    found = [tensor.untyped_storage() for tensor in tensors_of(worker, beside=worker.target).values()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Memory that a worker holds when the pools are sized."""
    found: dict[int, int] = {}
    allocate = WhiFlashWorker.alloc_memory_pool

    def noting(self: WhiFlashWorker, **pools: Any) -> None:
        found.update(reached(self))
        allocate(self, **pools)

    monkeypatch.setattr(WhiFlashWorker, "alloc_memory_pool", noting)
    return found


def test_the_pool_leaves_room_for_what_the_worker_allocates(models: Models, before: dict[int, int]) -> None:
    """As many slots fit beside everything that it holds in the end, and not one more."""
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        assert e.generate([[1, 2, 3, 4] * 4], max_new_tokens=12)
        target = e.scheduler.tp_worker.model_runner.token_to_kv_pool
        drafts = [d.kv for d in e.worker.drafters.values() if isinstance(d, KVDrafter)]
        slots = target.k_buffer[0].shape[0]
        all_kv = taken(*target.k_buffer, *target.v_buffer, *(t for kv in drafts for t in (kv.k, kv.v)))
        per_slot, rest = divmod(all_kv, slots)
        assert (len(drafts), rest) == (2, 0)
        others = {t.untyped_storage().data_ptr() for kv in drafts for t in (kv.k, kv.v)}
        others |= {e.worker.target.slot_table.untyped_storage().data_ptr(), *before}
        fixed = sum(size for address, size in reached(e.worker).items() if address not in others)
        assert fixed == e.worker.reservation.fixed
        assert pool_tokens(e) == (BUDGET - fixed) // per_slot


def test_a_pass_takes_no_more_for_its_logits_than_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, as on a GPU: there the largest pass is promised, if passes are captured. The kernel keeps nothing of
    a logit; its replacement needs memory for a few rows.
    """
    hidden, head = (torch.randn(size, 64, dtype=torch.bfloat16) for size in (1024, 4096))
    monkeypatch.setattr(choice, "backend_for", lambda _: "triton")

    def chosen() -> None:
        with torch.no_grad():
            choice.choose(torch.nn.functional.linear(hidden, head))

    chosen()
    peak = peak_bytes(chosen, tmp_path / "trace.json") / (1024 * 4096)
    print(f"{peak:.1f} bytes a logit")
    assert 0.8 * LOGIT_BYTES < peak <= LOGIT_BYTES


def test_an_engine_after_ours_is_as_it_was_before(models: Models) -> None:
    with engine(models.target) as e:
        before = layout(e)
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        assert all(ours != plain for ours, plain in zip(layout(e), before, strict=True))
    with engine(models.target) as e:
        assert layout(e) == before
        assert e.generate([[1, 2, 3]], max_new_tokens=4)
        e.check_leaks()

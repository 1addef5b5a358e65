"""Draft KV follows the target's into host memory, and comes back with it.

A prompt whose KV was evicted is loaded from the host: no feature comes with it, so drafters' KV at its slots must be
what one pass over the text gives, as in `trees.py`, and texts are plain decoding's under the same flags.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from engine import Engine, engine
from matrix import sampled
from model_set import Models
from tiny_models import tiny_eagle3
from traffic import mixed, play
from trees import TOLERANCE, assert_tree_is_true, matched_slots, sequences

from whiflash_sglang.cache.tokens import DraftKV
from whiflash_sglang.engine.scheduler import draft_pool
from whiflash_sglang.engine.scheduler.draft_pool import DraftPool
from whiflash_sglang.engine.scheduler.streamer import recording_of
from whiflash_sglang.errors import ConfigError

HOST: dict[str, Any] = {
    "enable_hierarchical_cache": True,
    "hicache_ratio": 6.0,
    "max_total_tokens": 448,
    "max_running_requests": 4,
}


@dataclass(frozen=True)
class Talk:
    """A conversation whose first turn is evicted before its second one.

    answers: of both turns. text: all of it. host: tokens of the second turn's prompt that came from host memory.
    """

    answers: tuple[list[int], list[int]]
    text: list[int]
    host: int
    rounds: tuple[int, int]


def talk(e: Engine, name: str = "talk", *, seed: int = 1, between: Callable[[], object] = int) -> Talk:
    """Play it; other requests evict it. between: called before the second turn."""
    rng = random.Random(seed)
    prompt = rng.choices(range(256), k=60)
    first = e.ask(f"{name}-1", prompt, max_new_tokens=48)
    # Write-through-selective takes what is hit.
    e.ask(f"{name}-again", [*prompt, *first, 1], max_new_tokens=1)
    for other in range(8):
        e.ask(f"{name}-other{other:02d}", rng.choices(range(256), k=100), max_new_tokens=1)
    between()
    again = [*prompt, *first, *rng.choices(range(256), k=10)]
    traced = {"whiflash": json.dumps({"trace": True})}
    second = e.ask(f"{name}-2", again, max_new_tokens=48, custom_params=traced)
    req = e.requests[f"{name}-2"]
    host = req.cached_tokens_host + req.cached_tokens_storage
    rounds = e.rounds(f"{name}-2") if e.scheduler.draft_worker else (0, 0)
    return Talk((first, second), [*again, *second], host, rounds)


def came_back(e: Engine, models: Models, expected: Talk, *, between: Callable[[], object] = int) -> Talk:
    """A talk as plain decoding has it, with as much from host memory and right draft KV in the tree."""
    found = talk(e, between=between)
    assert found.answers == expected.answers
    assert found.host >= expected.host - 1  # keys of two tokens: a page's last slot is not shared
    slots, wrong = wrong_slots(e, models, found.text)
    assert slots >= found.host
    assert not any(wrong.values()), wrong
    assert_tree_is_true(e, models)
    e.check_leaks()
    return found


def wrong_slots(e: Engine, models: Models, tokens: Sequence[int]) -> tuple[int, dict[str, int]]:
    """Slots that the tree has of a text, and how many of them hold another KV than one pass, by arm."""
    slots = matched_slots(e, tokens)
    wrong = {}
    for arm, expected in models.reference.keys_values(tokens).items():
        kv = e.worker.drafters[arm].kv
        bad = torch.zeros(len(slots), dtype=torch.bool)
        for found, wanted in ((kv.k, expected.k), (kv.v, expected.v)):
            error = (found[:, slots] - wanted[:, : len(slots)]).abs().amax(dim=(0, 2, 3))
            bad |= error > TOLERANCE * float(wanted.abs().max())
        wrong[arm] = int(bad.sum())
    return len(slots), wrong


@cache
def plain(models: Models, **flags: Any) -> Talk:
    """Plain decoding's."""
    with engine(models.target, **flags) as e:
        return talk(e)


FLAGS: dict[str, dict[str, Any]] = {
    "write-through": {"hicache_write_policy": "write_through"},
    "write-back-in-pages": {
        "hicache_write_policy": "write_back",
        "hicache_mem_layout": "page_first_direct",
        "page_size": 16,
    },
    "selective-in-pages-and-chunks": {
        "hicache_write_policy": "write_through_selective",
        "page_size": 64,
        "chunked_prefill_size": 64,
        "max_total_tokens": 640,
    },
    "chunks": {"hicache_write_policy": "write_back", "chunked_prefill_size": 8},
}


@pytest.mark.parametrize(
    ("flags", "router"),
    sampled(
        [(flags, router) for flags in FLAGS for router in ("ar", "diffusion", "random", "none")],
        ("write-through", "random"),
        ("write-back-in-pages", "diffusion"),
    ),
)
def test_draft_kv_comes_back_with_the_prompt(models: Models, flags: str, router: str) -> None:
    given = HOST | FLAGS[flags]
    expected = plain(models, **given)
    assert expected.host >= 64
    with engine(models.target, whiflash=models.whiflash(router), **given) as e:
        found = came_back(e, models, expected)
        tally = e.worker.snapshot()
        recorded = recording_of(e.requests["talk-2"], None).cached["host"]
        assert tally["cached"]["host"] == found.host == recorded
        loaded = tally["loaded"].values()
        assert sum(counts["rounds"] for counts in loaded) == found.rounds[0]
        # As many drafts are right as behind a prefill of all of it.
        assert e.scheduler.flush_cache()
        e.ask("cold", found.text[: -len(found.answers[1])], max_new_tokens=48)
        assert e.requests["cold"].cached_tokens == 0
        if router in ("ar", "diffusion"):
            assert e.rounds("cold") == found.rounds


TRAFFIC: dict[str, dict[str, Any]] = {
    "chunks": {"chunked_prefill_size": 16, "hicache_write_policy": "write_through"},
    "retracted-in-pages": {"page_size": 16, "hicache_write_policy": "write_back", "max_total_tokens": 320},
}


@pytest.mark.parametrize("case", sampled(TRAFFIC, "retracted-in-pages"))
def test_after_traffic(models: Models, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests leave, are aborted and retracted while copies in both directions are under way; then every text comes
    back.
    """
    from sglang.srt.managers import scheduler
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    luck = random.Random(3)
    monkeypatch.setattr(
        UnifiedRadixCache, "_count_ready_acks", lambda _, acks: min(len(acks), luck.choice((0, 0, 0, 1)))
    )
    arrivals = mixed(seed=11, count=16, shared=60, aborts=0.3, stops=0.3)
    arrivals += [replace(a, rid=f"again-{a.rid}", step=a.step + 60) for a in arrivals]
    flags = {**HOST, "max_total_tokens": 320, "retract": 5 * case.startswith("retracted"), **TRAFFIC[case]}
    with engine(models.target, whiflash=models.whiflash("random"), **flags) as e:
        play(e, arrivals)
        retracted = sum(req.retraction_count for req in e.requests.values())
        assert retracted > 2 or not case.startswith("retracted")
        scheduler.TEST_RETRACT = False  # `engine` puts back what was before
        checked = loaded = 0
        for number, text in enumerate(sequences(e)):
            e.ask(f"back-{number:03d}", [*text, 0], max_new_tokens=1)
            loaded += e.requests[f"back-{number:03d}"].cached_tokens_host
            slots, wrong = wrong_slots(e, models, text)
            checked += slots
            assert not any(wrong.values()), (number, wrong)
        assert loaded > 200, "hardly anything was in host memory"
        assert checked > 1000
        assert_tree_is_true(e, models)


def test_a_session_s_turns_come_back(models: Models) -> None:
    flags = HOST | FLAGS["write-through"] | {"enable_streaming_session": True}
    rng = random.Random(4)
    first, then = rng.choices(range(256), k=40), rng.choices(range(256), k=20)
    with engine(models.target, whiflash=models.whiflash("random"), **flags) as e:
        e.open_session("s", streaming=True)
        text = list[int]()
        for name, tokens in (("turn-1", first), ("turn-2", then)):
            text += [*tokens, *e.ask(name, tokens, max_new_tokens=30, session="s")]
        e.close_session("s")
        e.generate([[*text, 5]], max_new_tokens=20)
        found = talk(e)
        e.ask("back", [*text, 5, 6], max_new_tokens=1)
        assert e.requests["back"].cached_tokens_host > 60
        for each in (text, found.text):
            assert not any(wrong_slots(e, models, each)[1].values())


def stored(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    from sglang.srt.mem_cache.cpp_utils import native_hash

    native_hash._load_native_hash_module()  # else a thread compiles it while the scheduler polls for what it hashes
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(directory))
    return HOST | {
        "hicache_write_policy": "write_through",
        "hicache_storage_backend": "file",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config": '{"prefetch_threshold": 16}',
        "page_size": 16,
    }


def settle(e: Engine) -> None:
    """Until all that is to be stored is."""
    tree = e.scheduler.tree_cache
    for _ in range(1000):
        tree.check_hicache_events()
        if not tree.ongoing_write_through and not tree.ongoing_backup:
            return
        time.sleep(0.01)
    raise AssertionError("storage never came to rest")


def fetched(e: Engine, tokens: Sequence[int], name: str) -> int:
    """Tokens of a prompt that came from storage."""
    e.ask(name, [*tokens, 7], max_new_tokens=4)
    return int(e.requests[name].cached_tokens_storage)


def test_storage_is_the_pair_s_own(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = tmp_path / "pages"
    flags = stored(pages, monkeypatch)
    with engine(models.target, whiflash=models.whiflash("random"), **flags) as e:
        text = talk(e).text
        settle(e)
    of_the_same_shape = str(tiny_eagle3(tmp_path / "other", models.target, seed=99))
    another_pair = models.whiflash("random") | {"whiflash_eagle_draft": of_the_same_shape}
    with engine(models.target, whiflash=another_pair, **flags) as e:
        assert fetched(e, text, "other") == 0
    # The same pair after a restart: a page without the drafters' part ends what is loaded.
    key = next(each for each in sorted(pages.iterdir(), key=lambda f: f.stat().st_mtime) if "draft" in each.name)
    with engine(models.target, whiflash=models.whiflash("random"), **flags) as e:
        assert fetched(e, text, "after") >= len(text) - 32
        assert not any(wrong_slots(e, models, text)[1].values())
        assert e.scheduler.flush_cache()
        key.unlink()
        assert fetched(e, text, "without") < 32
        assert not any(wrong_slots(e, models, text)[1].values())
        # A drafter whose KV has holes: nothing is stored any more.
        with e.worker.quarantine.guard_ingestion("ar"):
            raise ValueError
        before = len(list(pages.iterdir()))
        talk(e, "holes", seed=2)
        settle(e)
        assert len(list(pages.iterdir())) == before


def test_drafters_that_one_host_pool_cannot_hold() -> None:
    pool = SimpleNamespace(size=16, page_size=1)
    kv, wide = (DraftKV(2, 17, 2, width, torch.float32, "cpu") for width in (16, 32))
    with pytest.raises(ConfigError, match=r"'ar' has 2 heads of 16, 'diffusion' has 2 heads of 32\); remove them"):
        DraftPool(pool, {"ar": kv, "diffusion": wide}, 4)
    with pytest.raises(ConfigError, match=r"target has 3 and the drafters have 4; remove them"):
        DraftPool(pool, {"ar": kv, "diffusion": kv}, 3)
    for dtype, stored in ((torch.float32, torch.float32), (torch.float8_e4m3fn, torch.uint8)):
        kv = DraftKV(2, 17, 2, 16, dtype, "cpu")
        views = DraftPool(pool, {"ar": kv, "diffusion": kv}, 4)
        assert [layer.data_ptr() for layer in views.k_buffer] == [layer.data_ptr() for layer in kv.k] * 2
        assert {layer.dtype for layer in views.k_buffer} == {stored}


def test_pages_of_two_pools_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_pool, "copies_kv", lambda: True)
    monkeypatch.setattr(draft_pool, "_digest", str)
    keys = set()
    for pool in (object(), Mock(spec=draft_pool.BaseSWAKVPool)):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            drafters: dict[str, Any] = {"ar": SimpleNamespace(model="model", kv_dtype=dtype)}
            keys.add(draft_pool.layout_of(SimpleNamespace(runner=Mock(token_to_kv_pool=pool)), drafters))
    assert len(keys) == 4

"""Windowed layers with a pool of their own (`--swa-full-tokens-ratio`): text is plain decoding's, and draft KV, at the
slots of the other layers, is what one pass gives.

Slots of the windowed pool are given back before a request's window, in the tree too. So the tree may hold a prefix of
which only the other layers have KV: it is prefilled again, and its slots in the tree change.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine, engine
from families import FAMILIES, WINDOW, Family, HuggingFace, tiny_family
from matrix import sampled
from model_set import Models
from oracle_arm import OracleArm
from overlap import overlapped
from plain import plain_texts
from previewed import talk
from reference import CPU, Comparison, ReferenceDrafters
from test_hicache import HOST, came_back, fetched, settle, stored
from test_hicache import talk as talk_of
from tiny_models import HEAD_DIM, tiny_dflash, tiny_eagle3
from traffic import mixed, play
from trees import assert_tree_is_true

from whiflash_sglang.checkpoints.fit import target_layers
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.table import read_draft

LAGUNA = "LagunaForCausalLM"


class OfHuggingFace(ReferenceDrafters):
    """Drafters on the features of Hugging Face's class."""

    def __init__(self, model: HuggingFace, eagle3: Path, dflash: Path) -> None:
        self.target = model  # type: ignore[assignment]
        options: dict[str, Any] = {
            "device": CPU,
            "dtype": torch.float32,
            "target_embedding": model.model.get_input_embeddings().weight.detach(),
            "target_lm_head": model.model.get_output_embeddings().weight.detach(),
        }
        self._eagle3, self._dflash = (Eagle3Drafter.load(eagle3, **options), DFlashDrafter.load(dflash, **options))
        layers = model.model.config.get_text_config().num_hidden_layers
        self._eagle3_layers = target_layers(read_draft(eagle3), layers)
        self._dflash_layers = target_layers(read_draft(dflash), layers)

    def _features(self, tokens: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
        return self.target.features(tokens, layers)  # type: ignore[attr-defined,no-any-return]


def build(root: Path, family: Family) -> Models:
    target = root / "target"
    model = tiny_family(target, family)
    eagle3, dflash = tiny_eagle3(root / "eagle3", target), tiny_dflash(root / "dflash", target)
    return Models(target, eagle3, dflash, OfHuggingFace(model, eagle3, dflash))


@pytest.fixture(scope="module")
def laguna(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build(tmp_path_factory.mktemp("laguna"), FAMILIES[LAGUNA])


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are given back one by one, not 128 together."""
    monkeypatch.setenv("SGLANG_SWA_EVICTION_INTERVAL", "1")


class Pools:
    """Uses of an engine's windowed pool."""

    def __init__(self, e: Engine, ratio: float) -> None:
        self.engine, allocator = e, e.scheduler.token_to_kv_pool_allocator
        assert allocator.size_swa < allocator.size_full
        assert allocator.size_swa <= ratio * allocator.size_full
        self.evicted = 0

    def note(self) -> None:
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        running = self.engine.scheduler.running_batch.reqs
        behind = [req.kv.get_evicted_seqlen(ComponentType.SWA) for req in running if req.kv is not None]
        self.evicted = max(self.evicted, *behind, 0)


TWO_SHAPES = {"global_head_dim": 2 * HEAD_DIM}
"""Gemma 4's layers as published."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "laguna": (LAGUNA, {"chunked_prefill_size": 16}),
    "sinks in pages": ("GptOssForCausalLM", {"page_size": 16, "chunked_prefill_size": 32}),
    "two shapes": ("Gemma4ForConditionalGeneration", {}),
}


@torch.inference_mode()
def lost(model: HuggingFace, prompt: Sequence[int], text: Sequence[int]) -> float:
    """How far a token of `text` is behind the likeliest one, at most."""
    logits = model.model(torch.tensor([[*prompt, *text]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return float((logits.amax(-1) - logits[torch.arange(len(text)), torch.tensor(text)]).max())


@pytest.mark.parametrize("case", sampled(CASES, "two shapes"))
def test_text_is_plain_decodings(case: str, tmp_path: Path) -> None:
    """Plain SGLang's with the same pools is Hugging Face's, and WHIFLASH's is that: longer than the window, of prompts
    with a common prefix, and of a turn that was previewed."""
    name, flags = CASES[case]
    family = FAMILIES[name]
    if case == "two shapes":
        family = replace(family, changes={**family.changes, **TWO_SHAPES})
    models = build(tmp_path, family)
    flags = {"max_running_requests": 4, "max_total_tokens": 1024, "swa_full_tokens_ratio": 0.25, **flags}
    flags |= {"enable_session_radix_cache": True}
    arrivals = mixed(seed=5, count=12, shared=40, longest=50, stops=0.1, tokens=48)
    with engine(models.target, **flags) as e:
        pools = Pools(e, 0.25)
        expected = play(e, arrivals, pools.note)
        assert pools.evicted > WINDOW
        talked = talk(e, ahead=False)
    for a in arrivals:
        assert lost(models.reference.target, a.prompt, expected[a.rid]) < 1e-3, a.rid  # type: ignore[arg-type]
    oracle = OracleArm(0.95, seed=3).knowing(arrivals, expected)
    with engine(models.target, whiflash=models.whiflash("random"), arms=[oracle], **flags) as e:
        pools = Pools(e, 0.25)
        found = play(e, arrivals, pools.note)
        assert pools.evicted > WINDOW
        assert talk(e, ahead=True)[:2] == (talked[0], 96)
    Comparison(models.reference.target).check_all(arrivals, expected, found)
    assert oracle.accepted
    assert oracle.rejected > 0


TRAFFIC: dict[str, dict[str, Any]] = {
    "aborts": {},
    "chunks-in-pages": {"chunked_prefill_size": 16, "page_size": 16, "max_total_tokens": 2048},
    "full-pool": {"max_total_tokens": 320, "swa_full_tokens_ratio": 0.4},
    "retracted": {"chunked_prefill_size": 8, "retract": 7},
    "overlap": {},
    "no-tree": {"disable_radix_cache": True, "chunked_prefill_size": 16},
}


@pytest.mark.parametrize("case", sampled(TRAFFIC, "chunks-in-pages", "overlap"))
def test_after_traffic(laguna: Models, case: str) -> None:
    """Every text is plain decoding's; no slot of either pool is lost, and every slot in the tree has right draft KV."""
    arrivals = mixed(seed=7, count=16, shared=60, aborts=0.3, stops=0.2, tokens=60)
    expected = plain_texts(laguna.target, arrivals, max_running_requests=6)
    oracle = OracleArm(0.93, seed=1).knowing(arrivals, expected)
    flags = {"max_total_tokens": 1024, "max_running_requests": 6, "swa_full_tokens_ratio": 0.5, **TRAFFIC[case]}
    start: Callable[..., Any] = overlapped if case == "overlap" else engine
    comparison = Comparison(laguna.reference.target)
    with start(laguna.target, whiflash=laguna.whiflash("random"), arms=[oracle], **flags) as e:
        pools = Pools(e, 0.5)
        # A second time, of prefixes whose windows are gone. Under the model of streams a pass takes long.
        for again in ("",) if case == "overlap" else ("", "again-"):
            found = play(e, [replace(a, rid=again + a.rid) for a in arrivals], pools.note)
            comparison.check_all(arrivals, expected, found, again)
        assert pools.evicted > WINDOW
        retracted = sum(req.retraction_count for req in e.requests.values())
        assert retracted > 0 or case not in ("full-pool", "retracted")
        if case != "no-tree":
            assert assert_tree_is_true(e, laguna) > 100
            assert any(req.cached_tokens > WINDOW for req in e.requests.values())


def test_the_host_gives_both_pools_back(laguna: Models) -> None:
    flags = HOST | {"hicache_write_policy": "write_through", "swa_full_tokens_ratio": 0.5}
    with engine(laguna.target, **flags) as e:
        expected = talk_of(e)
    assert expected.host >= 64
    with engine(laguna.target, whiflash=laguna.whiflash("random"), **flags) as e:
        came_back(e, laguna, expected)


@pytest.mark.evidence
@pytest.mark.parametrize("drafters", ["both", "none"])
def test_storage_of_one_pool_is_not_read_into_two(
    laguna: Models, drafters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages have the windowed layers too, and names that the second server would find."""
    flags = stored(tmp_path / "pages", monkeypatch)
    ours = laguna.whiflash("random")
    if drafters == "none":
        ours = {"whiflash_drafters": "none"}
    with engine(laguna.target, whiflash=ours, **flags) as e:
        first = talk_of(e)
        settle(e)
    for _ in range(2):
        with engine(laguna.target, whiflash=ours, **flags, swa_full_tokens_ratio=0.5) as e:
            came = fetched(e, first.text, "after")
            settle(e)
            again = talk_of(e)
            assert again.answers == first.answers
            settle(e)
    assert came >= 64


@pytest.mark.evidence
def test_a_session_s_turns(laguna: Models) -> None:
    rng = random.Random(4)
    turns = [rng.choices(range(256), k=30) for _ in range(3)]
    answers = []
    for whiflash in (None, laguna.whiflash("random")):
        flags = {"enable_streaming_session": True, "swa_full_tokens_ratio": 0.5}
        with engine(laguna.target, whiflash=whiflash, **flags) as e:
            e.open_session("s", streaming=True)
            said = [e.ask(f"turn-{i}", turn, max_new_tokens=40, session="s") for i, turn in enumerate(turns)]
            answers.append(said)
            e.close_session("s")
            e.check_leaks()
    assert answers[0] == answers[1]


def test_the_pools_leave_room_for_what_the_worker_allocates(laguna: Models) -> None:
    """Drafters are priced at a slot of the other layers, windowed layers at their part of one."""
    from sglang.srt.model_executor import pool_configurator

    budget, ratio = 8 * 2**20, 0.25
    with engine(laguna.target, whiflash=laguna.whiflash("auto"), swa_full_tokens_ratio=ratio) as e:
        runner = e.scheduler.tp_worker.model_runner
        pool, drafts = runner.token_to_kv_pool, [d.kv for d in e.worker.drafters.values() if hasattr(d, "kv")]
        assert {kv.k.shape[1] for kv in drafts} == {pool.full_kv_pool.k_buffer[0].shape[0]}
        configurator = pool_configurator.create_memory_pool_configurator(runner.kv_cache_configurator)
        sizes = configurator.calculate_pool_sizes(budget, page_size=1)

        def of_slot(*tensors: torch.Tensor) -> int:
            return sum(t[0].nbytes for t in tensors)

        full, own = (of_slot(*part.k_buffer, *part.v_buffer) for part in (pool.full_kv_pool, pool.swa_kv_pool))
        full += sum(of_slot(*kv.k.unbind(0), *kv.v.unbind(0)) for kv in drafts)
        assert len(drafts) == 2
        left = budget - e.worker.reservation.fixed
        assert sizes.full_max_total_num_tokens == int(left // (full + ratio * own))
        assert sizes.swa_max_total_num_tokens == int(sizes.full_max_total_num_tokens * ratio)
        assert e.worker.reservation.whole == int(full + ratio * own)

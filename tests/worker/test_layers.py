"""An EAGLE-3 drafter of two layers in the engine: plain decoding's text, and in the tree the KV of one full pass.

A stale entry of its upper layer would cost acceptance alone, so texts do not show it: slots and drafts are compared.
"""

import itertools
import random
import time

import pytest
from engine import engine
from model_set import Models, build_models
from parity import listen
from test_losslessness import CASES, Plain, compare, plain, with_oracle
from test_radix import assert_tree_is_true
from traffic import mixed, play

__all__ = ["plain"]

LAYERS = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("layers"), eagle3_layers=LAYERS)


@pytest.mark.parametrize("policy", ["ar", "auto", "random"])
def test_policies(models: Models, plain: Plain, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, shared prefixes, aborts; a clock as in `test_losslessness.py`."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 1000)
    arrivals = mixed(seed=1, count=14, shared=40, aborts=0.15, stops=0.3)
    expected = plain(arrivals)
    flags = models.whiflash(policy, whiflash_min_dwell=1)
    with engine(models.target, whiflash=flags, chunked_prefill_size=32, max_running_requests=6) as e:
        found = play(e, arrivals)
        assert e.worker.drafters["ar"].kv.k.shape[0] == LAYERS
        assert e.worker.tally.by_arm["ar"].proposed > 0
        assert assert_tree_is_true(e, models) > 100
    compare(models, arrivals, expected, found)


@pytest.mark.parametrize("case", ["pages-and-chunks", "full-pool"])
def test_after_traffic(models: Models, plain: Plain, case: str) -> None:
    """All arms at random, one of them right for long runs; where the pool is full requests are retracted."""
    arrivals = mixed(seed=2, count=14, shared=40, aborts=0.15, stops=0.3)
    expected = plain(arrivals)
    build, _ = with_oracle(models, arrivals, expected, seed=3, **CASES[case])
    with build as e:
        found = play(e, arrivals)
        retracted = sum(req.retraction_count for req in e.requests.values())
        assert assert_tree_is_true(e, models) > 100
    compare(models, arrivals, expected, found)
    assert (retracted > 0) == (case == "full-pool")


@pytest.mark.parametrize("others", ["none", "diffusion"])
def test_drafts_behind_other_arms_rounds_are_a_fresh_requests(models: Models, others: str) -> None:
    prompt = random.Random(5).choices(range(256), k=30)
    flags = models.whiflash(others)
    with engine(models.target, whiflash=flags, chunked_prefill_size=16) as e:
        verified = listen(e)
        e.submit("late", prompt, max_new_tokens=70)
        while len(e.requests["late"].output_ids) < 40:
            e.step()
        text = [*prompt, *e.requests["late"].output_ids]
        e.worker.reconfigure({"router": "ar"})
        verified.clear()
        e.run()
        late = verified[0]
        e.start_over("ar")
        verified.clear()
        e.generate([text[:-1]], max_new_tokens=10)
        assert len(late[0]) == e.worker.drafters["ar"].max_drafts + 1
        assert verified[0] == late

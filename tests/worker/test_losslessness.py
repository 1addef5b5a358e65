"""Greedy output equals plain decoding's, whatever drafts and however requests come and go (fp32).

The rule: identical, or at the first difference plain decoding's own top-two logit gap is at most 1e-4; such ties
are counted and printed.
"""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest
from engine import Engine, engine
from model_set import Models
from oracle_arm import ARM, OracleArm
from reference import Comparison
from traffic import Arrival, mixed, play

POLICIES = ("ar", "diffusion", "lookup", "entropy", "auto", "random", "none")
TAU = 2.0
"""Nats; near the tiny target's median, so that the entropy policy switches."""

CASES = {
    "alone": {"max_running_requests": 1},
    "batch": {"max_running_requests": 6},
    "pages": {"max_running_requests": 6, "page_size": 16},
    "chunks": {"max_running_requests": 6, "chunked_prefill_size": 16},
    "pages-and-chunks": {"max_running_requests": 6, "page_size": 16, "chunked_prefill_size": 32},
    "full-pool": {"max_running_requests": 6, "max_total_tokens": 320},
    "no-tree": {"max_running_requests": 6, "disable_radix_cache": True},
}

Outputs = dict[str, list[int]]
Plain = Callable[[Sequence[Arrival]], Outputs]


@pytest.fixture(scope="module")
def plain(models: Models) -> Plain:
    """Plain decoding of the same requests in the same engine; nothing is aborted there."""
    known: dict[tuple[str, ...], Outputs] = {}

    def outputs(arrivals: Sequence[Arrival]) -> Outputs:
        key = tuple(f"{a.rid}{a.prompt}{a.params}" for a in arrivals)
        if key not in known:
            with engine(models.target) as e:
                known[key] = play(e, [Arrival(a.rid, a.step, a.prompt, a.params) for a in arrivals])
        return known[key]

    return outputs


def compare(models: Models, arrivals: Sequence[Arrival], expected: Outputs, found: Outputs) -> Comparison:
    """An aborted request must have a prefix of the plain output, any other one all of it."""
    comparison = Comparison(models.reference.target)
    for a in arrivals:
        whole = expected[a.rid] if a.abort_after is None else expected[a.rid][: len(found[a.rid])]
        comparison.check(a.prompt, whole, found[a.rid], f"{a.rid} {a.params}")
    print(comparison.summary())
    return comparison


def with_oracle(
    models: Models, arrivals: Sequence[Arrival], expected: Outputs, seed: int, **arguments: object
) -> tuple[AbstractContextManager[Engine], OracleArm]:
    """An engine whose policy switches at random between all arms, one of which knows most of the answers."""
    oracle = OracleArm(0.93, seed=seed)
    for a in arrivals:
        oracle.learn(a.prompt, expected[a.rid])
    return engine(models.target, whiflash=models.whiflash("random"), arms=[oracle], **arguments), oracle


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(models: Models, plain: Plain, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` goes by prices: a clock that advances by a millisecond with every reading makes them the same anywhere."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 1000)
    arrivals = mixed(seed=1, count=14, shared=40, aborts=0.15, stops=0.3)
    expected = plain(arrivals)
    used: set[str | None] = set()
    flags = models.whiflash(policy, whiflash_entropy_threshold=TAU, whiflash_min_dwell=1)
    with engine(models.target, whiflash=flags, chunked_prefill_size=32, max_running_requests=6) as e:
        found = play(e, arrivals, lambda: used.update(*(state.counts for state in e.states.values())))
    compare(models, arrivals, expected, found)
    every = {"ar", "diffusion", "lookup", "none"}
    switching = {"entropy": {"ar", "diffusion"}, "random": every, "auto": {"ar", "lookup"}}
    assert used - {None} >= switching.get(policy, {policy})


@pytest.mark.parametrize("case", CASES)
def test_long_accepted_runs(models: Models, plain: Plain, case: str) -> None:
    arrivals = mixed(seed=2, count=18, shared=40, aborts=0.15, stops=0.3)
    expected = plain(arrivals)
    build, oracle = with_oracle(models, arrivals, expected, seed=3, **CASES[case])
    with build as e:
        found = play(e, arrivals)
        retracted = sum(req.retraction_count for req in e.requests.values())
    compare(models, arrivals, expected, found)
    assert max(oracle.accepted) == oracle.max_drafts, "no full block was accepted"
    assert oracle.rejected > 0, "nothing was rejected"
    assert (retracted > 0) == (case == "full-pool")


def test_retraction_at_any_step(models: Models, plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own switch retracts requests every third step."""
    from sglang.srt.managers import scheduler

    arrivals = mixed(seed=4, count=10, shared=30)
    for arrival in arrivals[::2]:
        arrival.params["frequency_penalty"] = 1e-7  # is counted, and too small to change a token
    expected = plain(arrivals)
    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    build, _ = with_oracle(models, arrivals, expected, seed=5, max_running_requests=4)
    with build as e:
        found = play(e, arrivals, lambda: check_known_tokens(e))
        assert sum(req.retraction_count for req in e.requests.values()) > 5
    compare(models, arrivals, expected, found)


@pytest.mark.parametrize("case", ["batch", "chunks", "full-pool"])
def test_predictions(models: Models, plain: Plain, case: str) -> None:
    """Right, partly right and useless ones, beside requests without, under a policy that switches at random."""
    rng = random.Random(6)
    arrivals = mixed(seed=6, count=16, shared=30, aborts=0.1)
    expected = plain(arrivals)
    for i, arrival in enumerate(arrivals):
        truth = expected[arrival.rid]
        broken = [token if rng.random() < 0.8 else rng.randrange(256) for token in truth]
        useless = rng.choices(range(256), k=50)
        predicted = (truth, broken, useless, truth[3:] + useless, None)[i % 5]
        if predicted is not None:
            arrival.params["custom_params"] = {"whiflash_prediction": predicted}
    build = engine(models.target, whiflash=models.whiflash("random"), **CASES[case])
    with build as e:
        found = play(e, arrivals)
        retracted = sum(req.retraction_count for req in e.requests.values())
        accepted = sum(req.spec_num_correct_drafts for req in e.requests.values())
    compare(models, arrivals, expected, found)
    assert (retracted > 0) == (case == "full-pool")
    assert accepted > 50, "hardly anything was drafted right, so nothing was tried"


def check_known_tokens(e: Engine) -> None:
    """The table of tokens of those who are penalised survives retraction into other rows, and other requests beside."""
    for req in e.scheduler.running_batch.reqs:
        if req.kv.req_pool_idx is not None and req.output_ids and req.sampling_params.frequency_penalty:
            prompt, output = len(req.origin_input_ids), list(req.output_ids)
            assert e.worker.tokens.data[req.kv.req_pool_idx, prompt : prompt + len(output)].tolist() == output


def test_a_third_arm_alone(models: Models, plain: Plain) -> None:
    """Pinned to an arm that the worker has never heard of: always right, so every round is as long as it may be."""
    from whiflash_sglang.routing.policies import Pinned

    arrivals = [Arrival("only", 0, tuple(range(20)), {"max_new_tokens": 41})]
    expected = plain(arrivals)
    oracle = OracleArm(1.0, ragged=False)
    oracle.learn(arrivals[0].prompt, expected["only"])
    with engine(models.target, whiflash=models.whiflash("none"), arms=[oracle]) as e:
        e.worker.controller.policy = Pinned(ARM)
        found = play(e, arrivals)
        rounds, accepted = e.rounds("only")
    assert found == expected
    # The first token comes from the prefill; each of the other 40 is one of 7 drafts or the token behind them.
    assert (rounds, accepted) == (5, 35)
    assert oracle.accepted == [7] * 5

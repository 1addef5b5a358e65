"""Strands: texts are plain decoding's whichever path of a request wins (fp32), in the real scheduler."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import pytest
import torch
from engine import engine
from matrix import sampled
from model_set import Models
from oracle_arm import OracleArm
from plain import check, compare, plain, plain_texts, read
from request_sets import CASES, OPTIONS, RATED, SAMPLED, SHORT_SCHEMA, rated
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
from test_sampling import PARAMETERS, judge, sample
from traffic import Arrival, mixed, play, without_a_pass
from trees import assert_tree_is_true
from whiflash_kernels import Drafts

from whiflash_sglang import verify
from whiflash_sglang.candidates import Candidate, Part
from whiflash_sglang.compat.scheduler.spec_worker import branches_of
from whiflash_sglang.core import DraftBatch, History
from whiflash_sglang.routing.costs import Worth
from whiflash_sglang.routing.policies import RandomPolicy, Scores
from whiflash_sglang.routing.signals import Signals


class Chain(OracleArm):
    """Says how likely its drafts are, so that others may propose beside them."""

    arm = "chain"

    def draft(self, batch: DraftBatch) -> Drafts:
        drafts = super().draft(batch)
        alive = (0.7 ** torch.arange(1, drafts.tokens.shape[1] + 1)).expand(drafts.tokens.shape)
        return drafts._replace(alive=alive)


class Free(OracleArm):
    """Proposes beside the chain, right where the chain may be wrong."""

    proposes = True

    def __init__(self, arm: str, accuracy: float, seed: int) -> None:
        super().__init__(accuracy, seed=seed)
        self.arm = arm

    def propose(
        self, row: int, length: int, history: History, worth: Worth, under_way: int = 0
    ) -> Candidate | None:
        super().propose(row, length, history, worth, under_way)
        ahead = self._ahead[row][: self.max_drafts]
        tokens = [
            a if self._random.random() < self._accuracy else self._random.choice(self._alphabet)
            for a in ahead
        ]
        chances = list(accumulate([0.8] * len(tokens), mul))
        return Candidate(tokens, chances, [Part(self.arm, len(tokens))]) if tokens else None


class ChainFirst(RandomPolicy):
    """Routes most rounds to the chain, and some to whoever may draft."""

    def score(self, signals: Signals) -> Scores:
        scores = super().score(signals)
        return {**scores, "chain": 0.9} if "chain" in scores else scores


@dataclass
class Seen:
    """What strands came to."""

    strands: int = 0
    won: int = 0
    forks: set[int] = field(default_factory=set)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found, fold = Seen(), verify.fold

    def recorded(*args: Any) -> Any:
        kept, indptr, accepted = fold(*args)
        won = [strand for strand, right in accepted if right]
        found.strands += len(args[3])
        found.won += len(won)
        found.forks |= {strand.fork for strand in won}
        return kept, indptr, accepted

    monkeypatch.setattr(verify, "fold", recorded)
    return found


def with_sources(arrivals: Sequence[Arrival], expected: dict[str, list[int]]) -> list[OracleArm]:
    arms = [Chain(0.5, seed=3), Free("free", 0.85, 4), Free("freer", 0.85, 5)]
    for arm in arms:
        for a in arrivals:
            arm.learn(a.prompt, expected[a.rid])
    return arms


@pytest.mark.parametrize(
    "case", sampled([case for case in CASES if case != "one request"], "full pool", "chunks in pages")
)
def test_text_is_plain_decodings(models: Models, seen: Seen, case: str) -> None:
    arrivals = mixed(seed=2, count=24, shared=40, aborts=0.15, stops=0.1, tokens=80)
    expected = plain_texts(models.target, arrivals)
    flags = models.whiflash("random", whiflash_branches=3)
    with engine(
        models.target,
        whiflash=flags,
        arms=with_sources(arrivals, expected),
        **{**CASES[case], "max_running_requests": 9},
    ) as e:
        e.worker.controller.policy = ChainFirst()
        found = play(e, arrivals)
        assert case not in ("batch", "full pool") or assert_tree_is_true(e, models) > 100
    compare(models.reference.target, arrivals, expected, found)
    print(seen)
    assert seen.strands > seen.won > 6, "hardly any strand won, so nothing was tried"
    assert len(seen.forks) > 1


def test_without_a_pass_the_likeliest_candidate_is_verified(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes first of two that are as often right, the round is counted for who says that it is."""
    arrivals = mixed(seed=2, count=8, shared=40, tokens=60)
    expected = plain_texts(models.target, arrivals)
    arms, propose = with_sources(arrivals, expected), Free.propose

    def unsure(arm: Free, *asked: Any) -> Candidate | None:
        candidate = propose(arm, *asked)
        if candidate is None or arm.arm != "free":
            return candidate
        return candidate._replace(alive=[0.1] * len(candidate.alive))

    monkeypatch.setattr(Free, "propose", unsure)
    with engine(models.target, whiflash=models.whiflash("random"), arms=arms) as e:
        monkeypatch.setattr(e.worker.controller, "route", partial(without_a_pass, e.worker.controller))
        compare(models.reference.target, arrivals, expected, play(e, arrivals))
        rounds = {arm: counts.rounds for arm, counts in e.worker.tally.by_arm.items()}
    assert rounds["freer"] > 20
    assert rounds["chain"] == rounds["free"] == 0


@pytest.mark.parametrize("kinds", [RATED, SAMPLED], ids=["greedy", "sampled"])
def test_records_are_plain_decodings(models: Models, seen: Seen, kinds: dict[str, Any]) -> None:
    """Log-probabilities, grammars with branches, stop strings; seeds by position where it is sampled."""
    schema = {"json_schema": SHORT_SCHEMA, "ignore_eos": False, "max_new_tokens": 60}
    options: dict[str, Any] = {**OPTIONS, "max_running_requests": 16, "enable_custom_logit_processor": True}
    if kinds is SAMPLED:
        schema["temperature"] = 0.8  # SGLang draws otherwise where a request of the batch is greedy
        options["enable_deterministic_inference"] = True
    arrivals = [replace(a, step=3 * a.step) for a in rated({**kinds, "schema": schema})]
    expected = plain(models.target, arrivals, **options)
    arms = with_sources(arrivals, {rid: answer.tokens for rid, answer in expected.items()})
    flags = models.whiflash("random", whiflash_branches=4)
    with engine(models.target, whiflash=flags, arms=arms, **options) as e:
        e.worker.controller.policy = ChainFirst()
        play(e, arrivals)
        answers = read(e, arrivals)
    check(models.reference.target, arrivals, expected, answers)
    assert seen.won > 10


@pytest.mark.parametrize(
    ("pool", "ranks", "exact", "pinned", "branches"),
    [
        (object(), 1, True, False, 3),
        (object(), 2, True, False, 1),
        (object(), 1, False, False, 1),
        (object(), 1, True, True, 1),
        (object.__new__(HybridReqToTokenPool), 1, True, False, 1),
    ],
    ids=["alone", "ranks", "device", "pinned", "states"],
)
def test_where_strands_are_not_made_the_log_says_so(
    pool: object, ranks: int, exact: bool, pinned: bool, branches: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert branches_of(3, pool, ranks=ranks, exact=exact, pinned=pinned) == branches
    assert branches_of(1, pool, ranks=ranks, exact=exact, pinned=pinned) == 1
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (branches == 1)


def test_joint_distribution(models: Models, seen: Seen) -> None:
    """Tokens that siblings split keep their frequencies."""
    torch.manual_seed(0)
    parameters = {name: PARAMETERS[name] for name in ("temperature", "top-k", "logit-bias")}
    arms = [Chain(0.9, seed=4), Free("free", 0.9, 5), Free("freer", 0.9, 6)]

    class All(OracleArm):
        def learn(self, prompt: Sequence[int], output: Sequence[int]) -> None:
            for arm in arms:
                arm.learn(prompt, output)

    options = {"max_running_requests": 48, "max_total_tokens": 8192, "skip_tokenizer_init": False}
    flags = models.whiflash("random", whiflash_branches=4)
    with engine(models.target, whiflash=flags, arms=arms, **options) as e:
        e.worker.controller.policy = ChainFirst()
        found = sample(e, All(0.9), parameters, each=400)
    for result in judge(models, found):
        assert result.test.p_value > 1e-4, result
        assert result.test.freedom >= 5, result
    assert seen.won > 100

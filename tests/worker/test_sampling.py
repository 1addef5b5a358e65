"""Sampled output has exactly the target's distribution, under every sampling parameter.

The real worker on a tiny target; the joint distribution of the first four tokens (one from the prefill, three or
more out of verified blocks) against the exact one. Requests with different parameters share every batch.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from engine import Engine, engine
from evidence import Result, cell
from expected import ChiSquare, goodness_of_fit, joint
from model_set import Models
from oracle_arm import OracleArm
from sglang.srt.layers import sampler
from sglang.srt.runtime_context import get_exec
from torch.nn.functional import normalize

from whiflash_sglang.engine.forward.target import Target
from whiflash_sglang.round.ends import GraphEnds

PROMPT = tuple(range(100, 130))
WINDOW = 4
STOPS = (69, 75)
BASE = {"temperature": 0.2, "ignore_eos": True}
"""Low enough that few continuations carry most of the probability: the tests need their counts."""

PARAMETERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.25},
    "top-p": {"temperature": 0.4, "top_p": 0.6},
    "top-k": {"temperature": 0.4, "top_k": 3},
    "min-p": {"temperature": 0.4, "min_p": 0.25},
    "frequency": {"frequency_penalty": 0.3},
    "presence": {"presence_penalty": 0.4},
    "repetition": {"repetition_penalty": 1.1},
    "min-new-tokens": {"min_new_tokens": 3, "stop_token_ids": STOPS},
    "logit-bias": {"logit_bias": {"70": 0.4, "79": -0.5, "12": 0.8}},
    "together": {
        "temperature": 0.4,
        "top_p": 0.8,
        "top_k": 6,
        "min_p": 0.05,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
        "repetition_penalty": 1.1,
        "logit_bias": {"72": 0.3},
    },
}


def sample(
    e: Engine, oracle: OracleArm, parameters: Mapping[str, Mapping[str, Any]], each: int, tokens: int = 9
) -> dict[str, list[list[int]]]:
    """`each` continuations of `PROMPT` per parameter set; requests of all sets share the batches.

    The first ones are what `oracle` drafts for the others.
    """
    found: dict[str, list[list[int]]] = {name: [] for name in parameters}
    for begin in range(0, each, 8):
        names = [(name, i) for i in range(begin, min(begin + 8, each)) for name in parameters]
        for name, i in names:
            e.submit(f"{name}/{i:06d}", PROMPT, max_new_tokens=tokens, **{**BASE, **parameters[name]})
        e.run()
        for name, i in names:
            output = e.output(f"{name}/{i:06d}")
            found[name].append(output[:WINDOW])
            if begin == 0:
                oracle.learn(PROMPT, output)
            del e.requests[f"{name}/{i:06d}"]
    return found


def judge(models: Models, found: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, ChiSquare]:
    """The chi-square of each parameter set's continuations."""
    results = {}
    for name, samples in found.items():
        params = {**BASE, **PARAMETERS[name]}
        cells = joint(models.reference.target, PROMPT, params, WINDOW, rare=5 / len(samples))
        test = results[name] = goodness_of_fit(samples, cells)
        print(f"{name}: chi² {test.statistic:.1f} at {test.freedom} degrees, p {test.p_value:.2g}")
    return results


def sampling_engine(
    models: Models, router: str, oracle: OracleArm | None = None, keys: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    return engine(
        models.target,
        whiflash=models.whiflash(router, keys),
        arms=[] if oracle is None else [oracle],
        max_running_requests=24,
        max_total_tokens=8192,
        skip_tokenizer_init=False,  # upstream's min_new_tokens asks the tokenizer for its stop tokens
        **arguments,
    )


def test_joint_distribution(models: Models) -> None:
    """A sample of the evidence: 160 sequences of each parameter set, arms switching at random every round.

    Rounds are grouped by a clock, so no seed repeats a run: one run in fifty has a set below 1e-3 by chance. Such a set
    is drawn once more, three times as often.
    """
    oracle = OracleArm(0.9, seed=4)
    with sampling_engine(models, "random", oracle) as e:
        results = judge(models, sample(e, oracle, PARAMETERS, each=160, tokens=6))
        accepted = sum(oracle.accepted) / len(oracle.accepted)
        unlikely = {name: PARAMETERS[name] for name, test in results.items() if test.p_value < 1e-3}
        again = judge(models, sample(e, oracle, unlikely, each=480)) if unlikely else {}
    assert accepted > 0.3, "hardly any draft was accepted, so nothing was verified"
    assert all(test.freedom >= 5 for test in results.values())
    assert not [name for name, test in again.items() if test.p_value < 1e-4]


@pytest.mark.evidence
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("policy", ["ar", "diffusion", "entropy", "random+oracle"])
def test_twenty_thousand_sequences(models: Models, policy: str) -> None:
    each = 20_000 // len(PARAMETERS)

    def measure() -> Result:
        torch.manual_seed(2606)
        oracle = OracleArm(0.9, seed=4)
        router, _, with_oracle = policy.partition("+")
        with sampling_engine(models, router, oracle if with_oracle else None) as e:
            found = sample(e, oracle, PARAMETERS, each)
        results = judge(models, found)
        return {
            "sequences": sum(test.samples for test in results.values()),
            "smallest p": min(test.p_value for test in results.values()),
            **{
                name: [f"χ² {test.statistic:.1f}", f"df {test.freedom}", f"p {test.p_value:.3f}"]
                for name, test in results.items()
            },
        }

    result = cell("sampling", policy, measure)
    # Ten tests for each of four policies: one of the forty falls below 1e-4 by chance in 4 of 1000 evidence runs.
    assert result["sequences"] >= 20_000
    assert result["smallest p"] > 1e-4


def test_the_test_can_fail(models: Models) -> None:
    """Samples of slightly other parameters: the chi-square must notice."""
    wrong: dict[str, dict[str, Any]] = {"min-p": {"temperature": 0.4}, "logit-bias": {}}
    for name, params in wrong.items():
        right, others = (
            joint(models.reference.target, PROMPT, {**BASE, **asked}, WINDOW, rare=5 / 200)
            for asked in (PARAMETERS[name], params)
        )
        drawn = random.Random(4).choices(list(right), [*right.values()], k=200)
        assert goodness_of_fit(drawn, right).p_value > 1e-4
        assert goodness_of_fit(drawn, others).p_value < 1e-6, name


def test_min_p_is_that_of_flashinfer(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's default sampler on a card, its operators by formulas, draws first tokens; the others are alike."""

    def top_k(probs: torch.Tensor, ks: torch.Tensor) -> torch.Tensor:
        least = probs.sort(1, descending=True).values.gather(1, ks[:, None].long() - 1)
        return normalize(probs * (probs >= least), 1.0)

    def top_p(probs: torch.Tensor, ps: torch.Tensor) -> torch.Tensor:
        likelier = (probs[:, None] * (probs[:, None] > probs[:, :, None])).sum(2)
        return normalize(probs * (likelier < ps[:, None]), 1.0)

    def min_p(probs: torch.Tensor, ms: torch.Tensor) -> torch.Tensor:
        return (probs * (probs >= probs.amax(1, True) * ms[:, None])).multinomial(1)[:, 0].int()

    operators = {"top_k_renorm_prob": top_k, "top_p_renorm_prob": top_p, "min_p_sampling_from_probs": min_p}
    for name, operator in operators.items():
        monkeypatch.setattr(sampler, name, operator, raising=False)
    asked = {"temperature": 0.4, "top_k": 3, "top_p": 0.75, "min_p": 0.01}
    oracle, each = OracleArm(0.9, seed=4), 400
    with sampling_engine(models, "random", oracle) as e, get_exec().kernel.override(sampling_backend="flashinfer"):
        found = sample(e, oracle, {"cut": asked}, each=each, tokens=6)["cut"]
    chances = [
        goodness_of_fit(found, joint(models.reference.target, PROMPT, params, WINDOW, rare=5 / each)).p_value
        for params in ({**BASE, **asked, "sequential": True}, {**BASE, **asked})
    ]
    assert chances[0] > 1e-4 > chances[1]


def test_nan_is_replaced_if_sglangs_switch_asks(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = Target.verify

    def broken(target: Target, *args: Any) -> Any:
        verified = verify(target, *args)
        verified.logits[:, 7] = torch.nan
        return verified

    commits = list[bool]()
    monkeypatch.setattr(GraphEnds, "let_commit", lambda _, may: commits.append(may))
    monkeypatch.setenv("SGLANG_SANITIZE_NAN_LOGITS", "1")
    monkeypatch.setattr(Target, "verify", broken)
    with engine(models.target, whiflash=models.whiflash("random")) as e:
        [text] = e.generate([PROMPT], max_new_tokens=20)
    assert 7 not in text
    assert not any(commits), "a graph samples before NaN is replaced"

"""The full matrices on tiny models (`make evidence`); `make test` runs samples of them."""

import pytest
import torch
from engine import engine
from evidence import Result, cell
from model_set import Models
from oracle_arm import OracleArm
from plain import compare, plain_texts
from request_sets import CASES
from test_sampling import PARAMETERS, judge, sample, sampling_engine
from traffic import mixed, play

SEEDS = (101, 102, 103)
POLICIES = ("ar", "diffusion", "lookup", "entropy", "auto", "random", "none")


@pytest.mark.evidence
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", [*POLICIES, "random+oracle"])
def test_losslessness_matrix(models: Models, policy: str, case: str) -> None:
    def measure() -> Result:
        compared = ties = tokens = retractions = 0
        for seed in SEEDS:
            arrivals = mixed(seed, count=20, shared=40, aborts=0.2, stops=0.3)
            expected = plain_texts(models.target, arrivals)
            oracle = OracleArm(0.93, seed=seed)
            for a in arrivals:
                oracle.learn(a.prompt, expected[a.rid])
            router, _, with_oracle = policy.partition("+")
            flags = models.whiflash(router, {"entropy": {"tau": 2.0, "min_dwell": 1}})
            with engine(
                models.target, whiflash=flags, arms=[oracle] if with_oracle else [], **CASES[case]
            ) as e:
                found = play(e, arrivals)
                retractions += sum(req.retraction_count for req in e.requests.values())
            comparison = compare(models.reference.target, arrivals, expected, found)
            compared, ties = compared + comparison.compared, ties + len(comparison.ties)
            tokens += sum(len(output) for output in found.values())
        return {"requests": compared, "tokens": tokens, "ties": ties, "retractions": retractions}

    result = cell("greedy-tiny", f"{policy}-{case}", measure)
    assert result["requests"] == 20 * len(SEEDS)


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
            "sequences": sum(r.test.samples for r in results),
            "smallest p": min(r.test.p_value for r in results),
            **{
                r.name: [f"χ² {r.test.statistic:.1f}", f"df {r.test.freedom}", f"p {r.test.p_value:.3f}"]
                for r in results
            },
        }

    result = cell("sampling", policy, measure)
    # Ten tests for each of four policies: one of the forty falls below 1e-4 by chance in 4 of 1000 evidence runs.
    assert result["sequences"] >= 20_000
    assert result["smallest p"] > 1e-4

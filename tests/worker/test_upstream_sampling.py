"""Why verification is this package's own: upstream's speculative workers change what is generated.

Their penalties are held for a whole block or dropped, and they ignore seeds. These tests pass while that is so;
should one fail, upstream has been repaired and our own code can be compared with it anew.
"""

from typing import Any

import pytest
from engine import engine
from model_set import Models
from parity import UPSTREAM
from plain import plain_texts
from request_sets import penalised
from test_sampling import PROMPT
from traffic import Arrival, play


def upstream_options(models: Models, arm: str) -> dict[str, Any]:
    checkpoint = models.eagle3 if arm == "ar" else models.dflash
    return {**UPSTREAM[arm], "speculative_draft_model_path": str(checkpoint), "skip_tokenizer_init": False}


@pytest.mark.parametrize("arm", UPSTREAM)
def test_penalties_change_upstream_output(models: Models, arm: str) -> None:
    arrivals = [a for a in penalised() if a.rid.startswith(("frequency", "presence", "repetition"))]
    expected = plain_texts(models.target, arrivals, skip_tokenizer_init=False)
    with engine(models.target, **upstream_options(models, arm)) as e:
        found = play(e, arrivals)
    wrong = [rid for rid in expected if found[rid] != expected[rid]]
    print(f"{arm}: {len(wrong)} of {len(expected)} penalised outputs are not plain decoding's")
    assert wrong


@pytest.mark.parametrize("arm", UPSTREAM)
def test_seeds_mean_something_else_upstream(models: Models, arm: str) -> None:
    params = {"max_new_tokens": 32, "temperature": 1.0}
    arrivals = [Arrival(f"s{seed}", 0, PROMPT, {**params, "sampling_seed": seed}) for seed in range(6)]
    expected = plain_texts(models.target, arrivals, enable_deterministic_inference=True)
    with engine(models.target, enable_deterministic_inference=True, **upstream_options(models, arm)) as e:
        found = play(e, arrivals)
    wrong = [rid for rid in expected if found[rid] != expected[rid]]
    print(f"{arm}: {len(wrong)} of {len(expected)} seeded outputs are not plain decoding's")
    assert wrong

"""Pinned to one arm, WHIFLASH accepts in every round what upstream's own algorithm accepts with that checkpoint.

Upstream's adaptive steps, which WHIFLASH is measured beside, serve on the CPU platform.
"""

import random

import pytest
from engine import engine
from matrix import sampled
from model_set import Models
from parity import UPSTREAM, compare


@pytest.mark.parametrize("arm", sampled(UPSTREAM, "ar"))
def test_accepted_tokens_per_round(models: Models, arm: str) -> None:
    compare(models.target, arm, models.eagle3 if arm == "ar" else models.dflash)


@pytest.mark.evidence
def test_upstream_adapts_its_steps_on_the_cpu(models: Models) -> None:
    """A drafter that is never right loses its steps; answers stay plain decoding's."""
    rng = random.Random(35)
    prompts = [rng.choices(range(256), k=n) for n in (5, 40, 19)]
    with engine(models.target) as e:
        expected = e.generate(prompts, max_new_tokens=40)
    adaptive = {
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": str(models.eagle3),
        "speculative_adaptive": True,
    }
    with engine(models.target, **adaptive) as e:
        before = e.worker.speculative_num_steps
        assert e.generate(prompts, max_new_tokens=40) == expected
        assert e.worker.speculative_num_steps < before
        e.check_leaks()

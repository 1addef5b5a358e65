"""Pinned to one arm, WHIFLASH accepts in every round what upstream's own algorithm accepts with that checkpoint."""

import random
from typing import Any

import pytest
from engine import engine
from model_set import Models

STEPS = 5


def lengths_per_step(models: Models, **arguments: Any) -> tuple[list[list[int]], int]:
    """Tokens that each request has after every step of the scheduler, and the drafts accepted in all."""
    rng = random.Random(11)
    prompts = [rng.choices(range(256), k=rng.randint(5, 50)) for _ in range(8)]
    lengths: list[list[int]] = []
    with engine(models.target, max_running_requests=8, **arguments) as e:
        for i, prompt in enumerate(prompts):
            e.submit(f"p{i}", prompt, max_new_tokens=80)
        e.run(lambda: lengths.append([len(req.output_ids) for req in e.requests.values()]))
        accepted = sum(e.rounds(rid)[1] for rid in e.requests)
    return lengths, accepted


UPSTREAM: dict[str, dict[str, Any]] = {
    "ar": {
        "speculative_algorithm": "EAGLE3",
        "speculative_num_steps": STEPS,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": STEPS + 1,
    },
    "diffusion": {"speculative_algorithm": "DFLASH", "disable_overlap_schedule": True},
}


@pytest.mark.parametrize("arm", UPSTREAM)
def test_accepted_tokens_per_round(models: Models, arm: str) -> None:
    checkpoint = models.eagle3 if arm == "ar" else models.dflash
    upstream, accepted = lengths_per_step(
        models, speculative_draft_model_path=str(checkpoint), **UPSTREAM[arm]
    )
    ours, ours_accepted = lengths_per_step(models, whiflash=models.whiflash(arm, whiflash_eagle_steps=STEPS))
    print(f"{arm}: {accepted} drafts accepted in {len(upstream)} steps of 8 requests, both ways")
    assert ours == upstream
    assert ours_accepted == accepted > 5

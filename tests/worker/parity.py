"""How far requests are after every step of the scheduler: with upstream's algorithms, or with one arm of ours."""

import random
from pathlib import Path
from typing import Any

from engine import engine

STEPS, TOKENS = 5, 80

UPSTREAM: dict[str, dict[str, Any]] = {
    "ar": {
        "speculative_algorithm": "EAGLE3",
        "speculative_num_steps": STEPS,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": STEPS + 1,
    },
    "diffusion": {"speculative_algorithm": "DFLASH", "disable_overlap_schedule": True},
}
"""Arm → the algorithm that it is compared with."""


def lengths_per_step(target: Path, **arguments: Any) -> tuple[list[list[int]], int]:
    """Tokens that each request has after every step of the scheduler, and the drafts accepted in all.

    A last block of upstream's may go beyond the end, which is cut later; ours does not.
    """
    rng = random.Random(11)
    prompts = [rng.choices(range(256), k=rng.randint(5, 50)) for _ in range(8)]
    lengths: list[list[int]] = []
    with engine(target, max_running_requests=8, **arguments) as e:
        for i, prompt in enumerate(prompts):
            e.submit(f"p{i}", prompt, max_new_tokens=TOKENS)
        e.run(lambda: lengths.append([min(len(req.output_ids), TOKENS) for req in e.requests.values()]))
        accepted = sum(e.rounds(rid)[1] for rid in e.requests)
    return lengths, accepted


def compare(target: Path, arm: str, checkpoint: Path, **upstream: Any) -> None:
    """Raise AssertionError where a round of ours accepts other than upstream's. upstream: its arguments."""
    arguments = {**UPSTREAM[arm], **upstream}
    theirs, accepted = lengths_per_step(target, speculative_draft_model_path=str(checkpoint), **arguments)
    ours, ours_accepted = lengths_per_step(
        target, whiflash={"draft": checkpoint, "whiflash_router": arm, "whiflash_eagle_steps": STEPS}
    )
    print(f"{arm}: {accepted} drafts accepted in {len(theirs)} steps of 8 requests, both ways")
    assert ours == theirs
    assert min(ours_accepted, accepted) > 5

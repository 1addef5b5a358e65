"""Each arm accepts in every round what upstream's algorithm accepts: of other targets than dense ones, and of targets
with a head of their own. Formats of drafts: `tests/models`.
"""

import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine, engine
from families import FAMILIES, tiny_family
from matrix import sampled
from own_heads import HEADS, tiny_with_head
from tiny_models import tiny_dflash, tiny_eagle3

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


@dataclass
class Rounds:
    """lengths: tokens that each request has after every step of the scheduler. verified: of every verification, each
    request's rows: its last token and the drafts behind it. accepted: drafts in all.
    """

    lengths: list[list[int]]
    verified: list[list[list[int]]]
    accepted: int


def rounds_of(target: Path, **arguments: Any) -> Rounds:
    """The same eight requests, whoever drafts.

    A last block of upstream's may go beyond the end, which is cut later; ours does not.
    """
    rng = random.Random(11)
    prompts = [rng.choices(range(256), k=rng.randint(5, 50)) for _ in range(8)]
    lengths: list[list[int]] = []
    with engine(target, max_running_requests=8, **arguments) as e:
        verified = listen(e)
        for i, prompt in enumerate(prompts):
            e.submit(f"p{i}", prompt, max_new_tokens=TOKENS)
        e.run(lambda: lengths.append([min(len(req.output_ids), TOKENS) for req in e.requests.values()]))
        return Rounds(lengths, verified, sum(e.rounds(rid)[1] for rid in e.requests))


def listen(e: Engine) -> list[list[list[int]]]:
    """`Rounds.verified`, which grows with every verification of the target's."""
    verified: list[list[list[int]]] = []
    worker = e.scheduler.tp_worker
    forward = worker.forward_batch_generation

    def heard(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_verify"):
            batch = kwargs["forward_batch"]
            layout = getattr(batch.spec_info, "ragged_verify_layout", None)
            requests, rows = batch.batch_size, batch.input_ids.tolist()
            widths = [len(rows) // requests] * requests if layout is None else layout.verify_lens.tolist()
            ends = list(accumulate(widths))
            verified.append([rows[end - width : end] for width, end in zip(widths, ends, strict=True)])
        return forward(*args, **kwargs)

    worker.forward_batch_generation = heard
    return verified


def compare(target: Path, arm: str, checkpoint: Path, **upstream: Any) -> None:
    """Raise AssertionError where a round of ours proposes or accepts other than upstream's.

    Args:
        upstream: its arguments.
    """
    arguments = {**UPSTREAM[arm], **upstream}
    theirs = rounds_of(target, speculative_draft_model_path=str(checkpoint), **arguments)
    ours = rounds_of(target, whiflash={"draft": checkpoint, "whiflash_router": arm, "whiflash_eagle_steps": STEPS})
    print(f"{arm}: {ours.accepted} drafts accepted in {len(ours.lengths)} steps of 8 requests, both ways")
    assert ours.lengths == theirs.lengths
    assert min(ours.accepted, theirs.accepted) > 5
    for number, (own, other) in enumerate(zip(ours.verified, theirs.verified, strict=True)):
        assert own == [rows[: len(cut)] for rows, cut in zip(other, own, strict=True)], f"verification {number}"
    proposed = sum(len(rows) for own in ours.verified for rows in own)
    assert proposed > 0.9 * sum(len(rows) for other in theirs.verified for rows in other), "ours are cut"


@pytest.mark.parametrize(
    ("name", "arm"),
    sampled(
        [
            ("Gemma4ForCausalLM", "ar"),  # from rows of the embedding as they are
            ("Gemma4ForCausalLM", "diffusion"),  # from the scaled embedding
            ("GptOssForCausalLM", "diffusion"),
            ("Qwen3MoeForCausalLM", "ar"),
            ("DeepseekV3ForCausalLM", "diffusion"),
        ],
        ("Gemma4ForCausalLM", "ar"),
        ("Gemma4ForCausalLM", "diffusion"),
    ),
)
def test_a_family(name: str, arm: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    tiny_family(target, FAMILIES[name])
    make = tiny_eagle3 if arm == "ar" else tiny_dflash
    compare(target, arm, make(tmp_path / "drafter", target))


@pytest.mark.parametrize("name", sampled(HEADS, "mimo"))
def test_a_head_of_the_targets_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # SGLang's GLM-4.5 asks for it on a CPU, too
    tiny_with_head(tmp_path / "target", name)
    compare(tmp_path / "target", "ar", tmp_path / "target", speculative_algorithm="EAGLE")

"""Prompts that two runs answered, and why their greedy answers differ where they do.

A shard answers with continuous batching, so the shapes of its products depend on what else it answers, and bf16 rounds
them differently. Where two tokens are nearly as good, that decides between them, and from there on the texts part.
"""

from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from whiflash_sglang.equality import TopTwo, bf16_ulp, is_tie
from whiflash_sglang.models.target import TargetModel, causal_attention
from whiflash_sglang.progress import tracked
from whiflash_sglang.train.answers.tokens import Exported


class Parting(NamedTuple):
    """Two sequences of one prompt, of which `position` is the first token that differs; None: one is the other's
    beginning, cut where a loop begins."""

    first: int
    second: int
    position: int | None


@dataclass(frozen=True)
class Copies:
    """repeated: pairs of a prompt's first answer and another one. partings: those that are not the same."""

    repeated: list[tuple[int, int]]
    partings: list[Parting]

    def counts(self) -> dict[str, object]:
        """Figures for a report."""
        firsts, others = ([pair[part] for pair in self.repeated] for part in (0, 1))
        return {
            "answered again": len(self.repeated),
            "first answers": f"{min(firsts)} to {max(firsts)}" if firsts else None,
            "other answers": f"{min(others)} to {max(others)}" if others else None,
            "with another answer": len(self.partings),
            "of which cut elsewhere alone": sum(parting.position is None for parting in self.partings),
        }


def compare_copies(exported: Exported) -> Copies:
    """Compare every further answer to a prompt with the first one."""
    repeated, partings = [], []
    for indices in exported.copies().values():
        for index in indices[1:]:
            repeated.append((indices[0], index))
            one, other = (exported.tokens(i).tolist() for i in (indices[0], index))
            if one != other:
                pairs = zip(one, other, strict=False)
                position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
                partings.append(Parting(indices[0], index, position))
    return Copies(repeated, partings)


def judge(exported: Exported, copies: Copies, target: TargetModel) -> dict[str, object]:
    """The target's own logits of both tokens, at every place where two answers part.

    One forward over what they share: its rounding is neither run's, so a tie is a gap that is within it. Gaps are
    counted in units in the last place of bfloat16 at the larger of the two logits.
    """
    dtype = str(target.dtype).removeprefix("torch.")
    ties, gaps = 0, []
    for parting in tracked(copies.partings, "asking the target"):
        if parting.position is None:
            continue
        one, other = (exported.tokens(i) for i in (parting.first, parting.second))
        logits = next_logits(target, one[: parting.position])
        a, b = (float(logits[tokens[parting.position]]) for tokens in (one, other))
        two = TopTwo(max(a, b), abs(a - b))
        ties += is_tie(two, dtype)
        gaps.append(two.gap / bf16_ulp(two.best))
    return {
        "dtype": dtype,
        "ties": ties,
        "beyond the tie rule": len(gaps) - ties,
        "gaps in bf16 ulps, median and largest": [round(median(gaps), 2), round(max(gaps), 2)]
        if gaps
        else None,
    }


@torch.inference_mode()
def next_logits(target: TargetModel, tokens: Tensor) -> Tensor:
    """The target's logits [V] fp32 behind `tokens` [T]."""
    tokens = tokens.to(target.device)
    attend = causal_attention(len(tokens), target.device, target.dtype)
    output = target.forward(tokens, torch.arange(len(tokens), device=tokens.device), attend, ())
    return target.logits(output.final[-1:])[0].float()

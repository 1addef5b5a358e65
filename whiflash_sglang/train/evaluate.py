"""Acceptance lengths on held-out prompts, without a server.

The text is the target's own greedy text whoever drafts, so every drafter is replayed at every answer
position: how many of its draft tokens agree with the text that followed. From these per-position lengths a
static drafter, a router and the hindsight oracle are each walked through the answer, round by round.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.train.batches import Batch, Span, unpack
from whiflash_sglang.train.dflash import choose_anchors, run_blocks
from whiflash_sglang.train.eagle3 import plan_chains, unroll
from whiflash_sglang.train.loops import loop_start
from whiflash_sglang.train.store import Sequence as Stored

ARMS = ("eagle3", "dflash")
LOOP = "loop"
ORACLE = "oracle"


class Replay(NamedTuple):
    """One answer with what each arm would have accepted.

    `accepted` arm → [P] draft tokens accepted by a round starting at answer position i (its bonus token is
    answer token i, P = answer tokens - 1). `final` [P, H] the target's state at the last committed token of
    that round. `loop_from`: answer position from which the text repeats itself, P where it never does.
    """

    id: str
    category: str
    accepted: dict[str, NDArray[np.int64]]
    final: Tensor
    loop_from: int


@torch.inference_mode()
def replay(
    sequence: Stored,
    eagle3: Eagle3Drafter,
    dflash: DFlashDrafter,
    capture: Sequence[int],
    eagle_steps: int,
) -> Replay | None:
    """Replay both drafters over one stored answer; None where it is too short to hold a round."""
    record = sequence.record
    positions = record.length - record.prompt_length - 1
    if positions < 1:
        return None
    batch = unpack(
        sequence.tokens,
        sequence.features,
        sequence.final,
        torch.tensor([record.length]),
        torch.tensor([record.prompt_length]),
    )
    accepted = {
        "eagle3": _chain_lengths(eagle3, batch, capture, eagle_steps),
        "dflash": _block_lengths(dflash, batch, capture),
    }
    answer = sequence.tokens[record.prompt_length :].tolist()
    start = loop_start(answer[:-1] if record.finished else answer)
    return Replay(
        record.id,
        record.category,
        accepted,
        sequence.final[record.prompt_length - 1 : record.length - 2],
        positions if start is None else min(start, positions),
    )


def _chain_lengths(
    drafter: Eagle3Drafter, batch: Batch, capture: Sequence[int], steps: int
) -> NDArray[np.int64]:
    plan = plan_chains(batch)
    columns = [list(capture).index(layer) for layer in _eagle_layers(drafter)]
    wanted = batch.tokens[plan.label_tokens]
    hits = []
    for step, logits in enumerate(unroll(drafter, batch, plan, columns, steps)):
        valid = plan.steps_left > step
        label = torch.where(valid, plan.label + step, 0)
        hits.append(valid & (drafter.target_ids(logits.argmax(-1)) == wanted[label]))
    return torch.stack(hits, 1).cumprod(1).sum(1).numpy()


def _eagle_layers(drafter: Eagle3Drafter) -> tuple[int, ...]:
    if not drafter.config.target_layer_ids:
        raise ValueError("the EAGLE-3 checkpoint names no eagle_aux_hidden_state_layer_ids")
    return drafter.config.target_layer_ids


def _block_lengths(drafter: DFlashDrafter, batch: Batch, capture: Sequence[int]) -> NDArray[np.int64]:
    blocks = choose_anchors(batch, per_token=1.0)
    columns = [list(capture).index(layer) for layer in drafter.target_layer_ids]
    hidden = run_blocks(drafter, batch, blocks, columns)
    # Two dimensions: a product of a three-dimensional view would copy the head once for every block.
    parts = torch.split(hidden.flatten(0, 1), 512)
    drafts = torch.cat([drafter.logits(part).argmax(-1) for part in parts]).view(hidden.shape[:2])
    span: Span = batch.spans[0]
    wanted = blocks.anchor[:, None] + torch.arange(1, drafter.block_size)
    valid = wanted < span.length
    hits = valid & (drafts == batch.tokens[wanted.clamp(max=span.length - 1)])
    return hits.cumprod(1).sum(1).numpy()


@dataclass
class Tally:
    """Rounds and tokens of a walk, and how many rounds each arm drafted."""

    rounds: int = 0
    tokens: int = 0
    won: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def acceptance_length(self) -> float:
        """Tokens per round, the bonus token included."""
        return self.tokens / self.rounds if self.rounds else float("nan")


def walk(answer: Replay, choose: Mapping[int, str] | str, begin: int, end: int, tally: Tally) -> None:
    """Go through answer positions [begin, end) with a fixed arm, or with the arm that `choose` names for a
    round.

    A round at i emits its accepted tokens and one more, but never beyond `end`.
    """
    position = begin
    while position < end:
        arm = choose if isinstance(choose, str) else choose[position]
        emitted = min(int(answer.accepted[arm][position]) + 1, end - position)
        tally.rounds += 1
        tally.tokens += emitted
        tally.won[arm] += 1
        position += emitted


def best_arms(answer: Replay) -> dict[int, str]:
    """The oracle: at every position the arm that accepts most; the first of `ARMS` on a tie."""
    lengths = np.stack([answer.accepted[arm] for arm in ARMS])
    return {position: ARMS[arm] for position, arm in enumerate(lengths.argmax(0))}


def tabulate(answers: Sequence[Replay], routers: Mapping[str, Sequence[Mapping[int, str]]]) -> dict[str, Any]:
    """Per category and overall figures.

    Args:
        routers: name → for each answer, the arm of every position.

    Returns:
        {"categories": {category: figures}, "overall": figures, "loop": figures}; `overall` weighs every
        category the same and leaves loops out. Figures: acceptance_length by drafter, router and oracle;
        rounds_won (share of all positions at which a drafter accepts strictly more); oracle_gain_share by
        router.
    """
    groups: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for index, answer in enumerate(answers):
        positions = len(answer.accepted[ARMS[0]])
        if answer.loop_from:
            groups[answer.category].append((index, 0, answer.loop_from))
        if answer.loop_from < positions:
            groups[LOOP].append((index, answer.loop_from, positions))
    figures = {name: _figures(answers, parts, routers) for name, parts in sorted(groups.items())}
    loop = figures.pop(LOOP, None)
    return {"categories": figures, "overall": _mean_figures(list(figures.values())), LOOP: loop}


def _figures(
    answers: Sequence[Replay],
    parts: Sequence[tuple[int, int, int]],
    routers: Mapping[str, Sequence[Mapping[int, str]]],
) -> dict[str, Any]:
    walks = {name: Tally() for name in (*ARMS, *routers, ORACLE)}
    strictly = dict.fromkeys(ARMS, 0)
    positions = 0
    for index, begin, end in parts:
        answer = answers[index]
        for arm in ARMS:
            walk(answer, arm, begin, end, walks[arm])
        for name, choices in routers.items():
            walk(answer, choices[index], begin, end, walks[name])
        walk(answer, best_arms(answer), begin, end, walks[ORACLE])
        first, second = (answer.accepted[arm][begin:end] for arm in ARMS)
        strictly[ARMS[0]] += int((first > second).sum())
        strictly[ARMS[1]] += int((second > first).sum())
        positions += end - begin
    lengths = {name: tally.acceptance_length for name, tally in walks.items()}
    return {
        "answers": len(parts),
        "positions": positions,
        "acceptance_length": lengths,
        "rounds_won": {arm: count / positions for arm, count in strictly.items()},
        "oracle_gain_share": _gain_shares(lengths, routers),
    }


def _gain_shares(lengths: Mapping[str, float], routers: Mapping[str, Any]) -> dict[str, float]:
    static = max(lengths[arm] for arm in ARMS)
    gain = lengths[ORACLE] - static
    return {name: (lengths[name] - static) / gain if gain > 0 else float("nan") for name in routers}


def _mean_figures(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def mean(key: str) -> dict[str, float]:
        return {name: float(np.mean([part[key][name] for part in parts])) for name in parts[0][key]}

    lengths = mean("acceptance_length")
    routers = [name for name in lengths if name not in (*ARMS, ORACLE)]
    return {
        "answers": sum(part["answers"] for part in parts),
        "positions": sum(part["positions"] for part in parts),
        "acceptance_length": lengths,
        "rounds_won": mean("rounds_won"),
        "oracle_gain_share": _gain_shares(lengths, dict.fromkeys(routers)),
    }

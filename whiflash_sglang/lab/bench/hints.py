"""What hints bought: `auto` beside `auto-no-hints`, the same server and policy without spans. Needs no server.

Both arms write the same text, so the spans that one of them saw divide the rounds of both.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from whiflash_sglang.lab.bench.cells import Answer, Cell
from whiflash_sglang.lab.statistics import Interval, paired_ratio

Key = tuple[str, int]
"""A prompt and the repetition in which it was asked."""


class Acceptance(BaseModel):
    """Acceptance length on one side of the spans' borders. tokens: committed there, of one repetition."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tokens: int
    with_hints: float
    without_hints: float
    ratio: Interval


class HintGain(BaseModel):
    """One category. speed: tokens per second with hints over those without.

    inside, outside: of spans; None where no round began there. unequal: answers of which the two arms' texts differ
    (ties in bf16); they count for speed only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    speed: Interval
    inside: Acceptance | None
    outside: Acceptance | None
    unequal: int


class Side(NamedTuple):
    """What one answer committed on one side of the spans' borders."""

    tokens: int
    rounds: int


class Divided(NamedTuple):
    """One answer's rounds, by where they began."""

    inside: Side
    outside: Side


def spans_of(answer: Answer) -> list[bool]:
    """For every output token but the first, whether the round that wrote it began inside a span."""
    return [round_.span is not None for round_ in answer.rounds for _ in range(round_.tokens)]


def divide(answer: Answer, inside: Sequence[bool]) -> Divided:
    """`answer`'s rounds by the `inside` of their first token (as `spans_of`)."""
    counts = {True: Side(0, 0), False: Side(0, 0)}
    position = 0
    for round_ in answer.rounds:
        side = inside[position]
        counts[side] = Side(counts[side].tokens + round_.tokens, counts[side].rounds + 1)
        position += round_.tokens
    return Divided(counts[True], counts[False])


def hint_gain(
    hinted: Sequence[Cell],
    unhinted: Sequence[Cell],
    category: Mapping[str, str],
    speed: Interval,
) -> HintGain:
    """The gain over some prompts, the same in both arms.

    Args:
        category: of every prompt. speed: the rate of the first over that of the second.
    """
    ours, theirs = _by_key(hinted), _by_key(unhinted)
    pairs: dict[Key, tuple[Divided, Divided]] = {}
    for key in ours.keys() & theirs.keys():
        mine, other = ours[key], theirs[key]
        inside = spans_of(mine)
        if mine.tokens == other.tokens and sum(round_.tokens for round_ in other.rounds) == len(inside):
            pairs[key] = divide(mine, inside), divide(other, inside)
    return HintGain(
        speed=speed,
        inside=_acceptance({k: (a.inside, b.inside) for k, (a, b) in pairs.items()}, category),
        outside=_acceptance({k: (a.outside, b.outside) for k, (a, b) in pairs.items()}, category),
        unequal=sum(ours[key].tokens != theirs[key].tokens for key in ours.keys() & theirs.keys()),
    )


def _by_key(cells: Sequence[Cell]) -> dict[Key, Answer]:
    return {(answer.prompt, cell.repetition): answer for cell in cells for answer in cell.answers}


def _acceptance(pairs: Mapping[Key, tuple[Side, Side]], category: Mapping[str, str]) -> Acceptance | None:
    """Prompts that began a round on this side in both arms in every repetition that any of them has."""
    rows: dict[str, list[tuple[Side, Side]]] = defaultdict(list)
    for (prompt, _), sides in sorted(pairs.items()):
        if all(side.rounds for side in sides):
            rows[prompt].append(sides)
    most = max(map(len, rows.values()), default=0)
    whole = {prompt: row for prompt, row in rows.items() if len(row) == most}
    if not whole:
        return None
    # [prompts, repetitions, arm, (tokens, rounds)]
    counts = np.array(list(whole.values()), dtype=np.float64)
    ours, theirs = counts[:, :, 0], counts[:, :, 1]
    ratio = paired_ratio(
        ours[..., 0], ours[..., 1], theirs[..., 0], theirs[..., 1], [category[prompt] for prompt in whole]
    )
    return Acceptance(
        tokens=int(ours[..., 0].sum()) // most,
        with_hints=float(ours[..., 0].sum() / ours[..., 1].sum()),
        without_hints=float(theirs[..., 0].sum() / theirs[..., 1].sum()),
        ratio=ratio,
    )

"""Which answers a figure is made of, and rates over them. Needs no server."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from whiflash_sglang.lab.bench.arms import NONE
from whiflash_sglang.lab.bench.cells import Answer, Cell
from whiflash_sglang.lab.statistics import Floats, Interval, paired_ratio, rate
from whiflash_sglang.train.answers.loops import loop_start

Belongs = Callable[[str], bool]
"""Whether a prompt counts."""
OVERALL, LOOPS = "overall", "loops"


def selections(cells: Sequence[Cell], groups: Mapping[str, str]) -> list[tuple[str, Belongs]]:
    """Categories that occur, loops last, and what belongs to each; overall is everything but loops."""
    occurring = {groups[answer.prompt] for cell in cells for answer in cell.answers}
    names = sorted(occurring - {LOOPS})
    chosen: list[tuple[str, Belongs]] = [(name, _member(groups, name)) for name in names]
    if names:
        chosen.append((OVERALL, lambda prompt: groups[prompt] != LOOPS))
    if LOOPS in occurring:
        chosen.append((LOOPS, _member(groups, LOOPS)))
    return chosen


def _member(groups: Mapping[str, str], name: str) -> Belongs:
    return lambda prompt: groups[prompt] == name


def samples(cells: Sequence[Cell]) -> tuple[Floats, Floats]:
    """Tokens and seconds, [units, repetitions]: a unit is the prompts of one cell, asked in every repetition."""
    units: dict[tuple[str, ...], dict[int, Cell]] = defaultdict(dict)
    for cell in cells:
        units[cell.key[3]][cell.repetition] = cell
    rows = [list(by_repetition.values()) for _, by_repetition in sorted(units.items())]

    def tokens_of(cell: Cell) -> int:
        return sum(len(answer.tokens) for answer in cell.answers)

    def seconds_of(cell: Cell) -> float:
        answers: tuple[Answer, ...] = cell.answers
        return answers[0].seconds if len(answers) == 1 else cell.seconds

    return (
        np.array([[tokens_of(cell) for cell in row] for row in rows], dtype=np.float64),
        np.array([[seconds_of(cell) for cell in row] for row in rows], dtype=np.float64),
    )


def within(cells: Sequence[Cell], belongs: Belongs) -> list[Cell]:
    """Cells whose prompts all count."""
    return [cell for cell in cells if all(belongs(answer.prompt) for answer in cell.answers)]


def paired(cells: Sequence[Cell], others: Sequence[Cell], groups: Mapping[str, str]) -> Interval:
    """Rate of `cells` over that of `others`, which were asked the same; prompts are drawn within their group."""
    strata = [groups[key[0]] for key in sorted({cell.key[3] for cell in cells})]
    return paired_ratio(*samples(cells), *samples(others), strata)


class TurnFigures(BaseModel):
    """One arm at one turn. over_none: of tokens per second; None for plain decoding itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: int
    output_tokens_per_s: float
    acceptance_length: float
    over_none: Interval | None


def by_turn(
    cells: Mapping[str, Sequence[Cell]], groups: Mapping[str, str], turns: Mapping[str, int]
) -> dict[str, dict[int, TurnFigures]]:
    """Figures by arm and turn, loops left out; empty where all conversations are at the same turn.

    Only conversations count: categories in which some prompt is beyond its first turn. Different turns are different
    prompts, unless the prompts file asked for follow-up turns.

    Args:
        cells: by arm, of prompts asked one at a time. groups: prompt → category or loops. turns: prompt → turn, from 1.
    """
    asked = {answer.prompt for own in cells.values() for cell in own for answer in cell.answers}
    talking = {groups[key] for key in asked if turns[key] > 1} - {LOOPS}
    numbers = sorted({turns[key] for key in asked if groups[key] in talking})

    def figures(arm: str, turn: int) -> TurnFigures:
        def belongs(key: str) -> bool:
            return groups[key] in talking and turns[key] == turn

        own = within(cells[arm], belongs)
        answers = [answer for cell in own for answer in cell.answers]
        forwards = sum(answer.forwards for answer in answers)
        drafted = sum(len(answer.tokens) - 1 for answer in answers)
        return TurnFigures(
            prompts=len({answer.prompt for answer in answers}),
            output_tokens_per_s=rate(*samples(own)),
            acceptance_length=drafted / forwards if forwards else 1.0,
            over_none=paired(own, within(cells[NONE], belongs), groups)
            if arm != NONE and NONE in cells
            else None,
        )

    return {arm: {turn: figures(arm, turn) for turn in numbers} for arm in cells} if len(numbers) > 1 else {}


FIRST_POSITIONS = 64
"""Tokens of the first stretch of an answer that is reported by position; every further one ends at twice its start."""


class PositionFigures(BaseModel):
    """One arm in one stretch of its answers. acceptance_length: tokens a round, of rounds that began there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int
    acceptance_length: float


def by_position(cells: Mapping[str, Sequence[Cell]]) -> dict[str, dict[int, PositionFigures]]:
    """Figures by arm and by the position that a stretch ends at; of arms whose answers were traced.

    An answer counts up to where it begins to loop, since loops flatter every drafter.
    """
    found: dict[str, dict[int, PositionFigures]] = {}
    for arm, own in cells.items():
        counts: dict[int, list[int]] = defaultdict(list)
        for answer in (answer for cell in own for answer in cell.answers):
            ends, position = loop_start(answer.tokens), 1  # the prefill's token is no round's
            for written in answer.rounds:
                if ends is not None and position >= ends:
                    break
                end = FIRST_POSITIONS
                while end <= position:
                    end *= 2
                counts[end].append(written.tokens)
                position += written.tokens
        if counts:
            found[arm] = {
                end: PositionFigures(rounds=len(tokens), acceptance_length=sum(tokens) / len(tokens))
                for end, tokens in sorted(counts.items())
            }
    return found

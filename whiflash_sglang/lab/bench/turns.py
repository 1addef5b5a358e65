"""Conversations by turn: what came before an answer grows, and with it what there is to copy. Needs no server."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from whiflash_sglang.lab.bench.arms import NONE
from whiflash_sglang.lab.bench.cells import Cell
from whiflash_sglang.lab.bench.selection import LOOPS, paired, samples, within
from whiflash_sglang.lab.statistics import Interval, rate


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

"""In which order arms are asked. Needs no server.

Interleaved, every prompt is asked of each arm before the next prompt comes, so that drift of the machine hits all
arms alike; who comes first rotates, so that no arm is always measured after the same other one.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from whiflash_sglang.lab.bench.cells import Cell, Load


class Step(NamedTuple):
    """One cell to measure: `prompts` (ids) asked of `arm` under `load`."""

    load: Load
    arm: str
    repetition: int
    prompts: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, int, tuple[str, ...]]:
        """As `Cell.key`."""
        return self.load.label, self.arm, self.repetition, tuple(sorted(self.prompts))


def sweep(
    arms: Sequence[str],
    loads: Sequence[Load],
    repetition: int,
    alone: Sequence[str],
    together: Sequence[str],
) -> Iterator[Step]:
    """One repetition, interleaved.

    Args:
        alone: prompts asked one at a time. together: prompts asked under every other load.
    """
    turn = repetition
    for load in loads:
        units = [(prompt,) for prompt in alone] if load.is_alone else [tuple(together)]
        for unit in units:
            for arm in _rotated(arms, turn):
                yield Step(load, arm, repetition, unit)
            turn += 1


def in_turn(
    arms: Sequence[str],
    loads: Sequence[Load],
    repetitions: int,
    alone: Sequence[str],
    together: Sequence[str],
) -> Iterator[Step]:
    """Everything of one arm, then everything of the next: one server at a time."""
    for arm in arms:
        for repetition in range(repetitions):
            yield from sweep([arm], loads, repetition, alone, together)


def remaining(steps: Sequence[Step], cells: Collection[Cell]) -> list[Step]:
    """The steps that were not measured yet."""
    done = {cell.key for cell in cells}
    return [step for step in steps if step.key not in done]


def _rotated(arms: Sequence[str], turn: int) -> list[str]:
    first = turn % len(arms)
    return [*arms[first:], *arms[:first]]

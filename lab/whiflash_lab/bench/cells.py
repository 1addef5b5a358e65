"""Measured cells (the answers of one arm under one load in one repetition), and their journal. Needs no server."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.jsonl import lines_of, read_json, write_whole
from whiflash_sglang.prices.round_clock import STAGES


class Load(BaseModel, frozen=True, extra="forbid"):
    """A closed load: `value` requests in flight at any time."""

    kind: Literal["closed"] = "closed"
    value: int

    @property
    def label(self) -> str:
        return f"{self.kind}-{self.value}"

    @property
    def is_alone(self) -> bool:
        """Whether there is one request at a time, so that prompts can be interleaved between the arms one by one."""
        return self.value == 1


class Turn(BaseModel, frozen=True, extra="forbid"):
    """One answer of a conversation, or the mean of several.

    prompt: tokens of the prompt. cached: those found in the prefix cache. tokens: of the answer. ttft, seconds: seconds
    from the request to its first and its last token.
    """

    prompt: float
    cached: float
    tokens: float
    ttft: float
    seconds: float


class Answer(BaseModel, frozen=True, extra="forbid"):
    """One timed answer, or all answers of a conversation together.

    seconds: from the request to its last token. ttft: seconds to the first token, for a single answer. tokens: output
    ids. forwards: target forwards after the prefills. prefills: each gave one token. turns: of a conversation.
    """

    prompt: str
    seconds: float
    ttft: float | None
    tokens: tuple[int, ...]
    forwards: int
    prefills: int = 1
    turns: tuple[Turn, ...] = ()

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first."""
        if self.ttft is None or len(self.tokens) < 2:
            return None
        return (self.seconds - self.ttft) / (len(self.tokens) - 1)


class Cell(BaseModel, frozen=True, extra="forbid"):
    """Answers of one arm under one load in one repetition, asked without a pause.

    seconds: from the first request to the last answer. rounds: increase of WHIFLASH's round clock meanwhile.
    """

    load: Load
    arm: str
    repetition: int
    seconds: float
    answers: tuple[Answer, ...]
    rounds: dict[str, float] | None = None

    @property
    def key(self) -> tuple[str, str, int, tuple[str, ...]]:
        """Key by which a resumed run finds the cell: load, arm, repetition and prompts."""
        return self.load.label, self.arm, self.repetition, tuple(sorted(a.prompt for a in self.answers))


class Journal:
    """Writes cells as lines of a file as they are measured, so that a run can be resumed.

    The first line holds the plan's fingerprint, so that cells of another plan are never mixed in.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self._fingerprint = path, fingerprint

    def begin(self, cells: Sequence[Cell] = ()) -> None:
        """Write a new file with `cells`. Without cells, an earlier run's file is renamed to `*.before`."""
        if not cells and self.path.exists():
            self.path.replace(self.path.with_name(f"{self.path.name}.before"))
        lines = [json.dumps({"fingerprint": self._fingerprint}), *(cell.model_dump_json() for cell in cells)]
        write_whole(self.path, "\n".join(lines) + "\n")

    def append(self, cell: Cell) -> None:
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(cell.model_dump_json() + "\n")

    def read(self) -> list[Cell]:
        """Read the cells of an interrupted run; an empty list without a file. A line cut off at the end is dropped.

        Raises:
            ConfigError: the file belongs to another plan.
        """
        if not self.path.exists():
            return []
        lines = [line for _, line in lines_of(self.path.read_text(encoding="utf-8"))]
        try:
            fingerprint = read_json(lines[0])["fingerprint"] if lines else None
        except (ValueError, KeyError, TypeError):
            fingerprint = None
        if fingerprint != self._fingerprint:
            raise ConfigError(
                f"{self.path} was written by another plan (arms, prompts, loads or versions differ); "
                "remove it or run without --resume"
            )
        return list(self._whole(lines[1:]))

    def _whole(self, lines: list[str]) -> Iterator[Cell]:
        for number, line in enumerate(lines, start=1):
            try:
                yield Cell.model_validate_json(line)
            except ValidationError as error:
                if number != len(lines):
                    raise ConfigError(
                        f"{self.path} holds a line of another version of this program "
                        f"({error.errors()[0]['msg']}); remove it or run without --resume"
                    ) from None


class RoundMs(BaseModel, frozen=True, extra="forbid"):
    """Mean milliseconds of a WHIFLASH round per stage; other: the part of the round outside all stages."""

    route: float
    catch_up: float
    draft: float
    verify: float
    commit: float
    park: float
    other: float

    @property
    def total(self) -> float:
        return float(sum(self.model_dump().values()))


def round_ms_of(gained: Mapping[str, float]) -> RoundMs:
    """Compute the milliseconds per stage. gained: differences of `RoundClock.snapshot` over at least one round."""
    stages = {name: 1000 * gained[f"{name}_seconds"] / gained["rounds"] for name in STAGES}
    return RoundMs(**stages, other=1000 * gained["round_seconds"] / gained["rounds"] - sum(stages.values()))


def switch_share_of(gained: Mapping[str, float]) -> float:
    """Return the share of a round spent on switching: route, park, and catch-up beyond one round's tokens."""
    spent = gained["route_seconds"] + gained["park_seconds"] + gained["extra_catch_up_seconds"]
    return spent / gained["round_seconds"]

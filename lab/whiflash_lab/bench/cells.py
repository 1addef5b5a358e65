"""Measured cells: the answers of one arm under one load in one repetition. Needs no server."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

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
    from the request to its first and its last token. known: tokens of the prompt that the agent's turn before had
    computed.
    """

    prompt: float
    cached: float
    tokens: float
    ttft: float
    seconds: float
    known: float = 0.0


class Answer(BaseModel, frozen=True, extra="forbid"):
    """One timed answer, or all answers of a conversation together.

    seconds: from the request to its last token. ttft: seconds to the first token, for a single answer. tokens: output
    ids, or the text's characters if the server gives no ids; then count is the number of output tokens. forwards:
    target forwards after the prefills, None if the server does not say. prefills: each gave one token. turns: of a
    conversation. text, calls: content and tool calls of a single answer, for the turn after it.
    """

    prompt: str
    seconds: float
    ttft: float | None
    tokens: tuple[int, ...]
    forwards: int | None
    prefills: int = 1
    turns: tuple[Turn, ...] = ()
    count: int | None = None
    text: str = ""
    calls: tuple[dict[str, Any], ...] = ()

    @property
    def length(self) -> int:
        """Number of output tokens."""
        return len(self.tokens) if self.count is None else self.count

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first."""
        if self.ttft is None or self.length < 2:
            return None
        return (self.seconds - self.ttft) / (self.length - 1)


class Cell(BaseModel, frozen=True, extra="forbid"):
    """Answers of one uninterrupted benchmark run: one arm under one load, one repetition.

    seconds: from the first request to the last answer. counters: increase of the server's counters meanwhile, those
    of WHIFLASH's round clock and of SGLang's evictions.
    """

    load: Load
    arm: str
    repetition: int
    seconds: float
    answers: tuple[Answer, ...]
    counters: dict[str, float] | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """Ids of the prompts, sorted."""
        return tuple(sorted(answer.prompt for answer in self.answers))


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
    """Compute the mean milliseconds per stage. gained: differences of `RoundClock.snapshot` over at least one round."""
    stages = {name: 1000 * gained[f"{name}_seconds"] / gained["rounds"] for name in STAGES}
    return RoundMs(**stages, other=1000 * gained["round_seconds"] / gained["rounds"] - sum(stages.values()))


def switch_share_of(gained: Mapping[str, float]) -> float:
    """Return the share of a round spent on switching: route, park, and catch-up beyond one round's tokens."""
    spent = gained["route_seconds"] + gained["park_seconds"] + gained["extra_catch_up_seconds"]
    return spent / gained["round_seconds"]

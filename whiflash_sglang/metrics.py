"""Where a round's time goes, on the host's clock.

On a CPU these are the stages' costs. On a GPU, where launches return before the work is done, only whole rounds
mean anything on this clock; a device-side breakdown needs the profiler.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

STAGES = ("route", "catch_up", "draft", "verify", "commit", "park")


class PreviousRound(NamedTuple):
    """rows: verified, of `requests` requests. tokens: that were found committed since the round before it began.

    seconds: from its start to its end; drafting: part of them. gap: from its end to the next round's start, at most
    as long as itself: a longer one was a pause.
    """

    rows: int
    requests: int
    tokens: int
    seconds: float
    drafting: float
    gap: float

    @property
    def rest(self) -> float:
        """Seconds that were no drafting."""
        return max(self.seconds - self.drafting, 1e-6)


@dataclass(slots=True)
class RoundClock:
    """Totals since the start, in seconds, and what the cost model learns from the last round.

    seconds: per stage. rounds, rows: totals. round_seconds: of the stages together and what lies between.
    tokens: committed. switches: rounds of a request drafted by another arm than its round before.
    extra_catch_up_seconds: part of the catch-up that a drafter used in every round would not have had.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    rounds: int = 0
    rows: int = 0
    round_seconds: float = 0.0
    tokens: int = 0
    switches: int = 0
    extra_catch_up_seconds: float = 0.0
    _began: float = 0.0
    _drafting: float = 0.0
    _learned: int = 0
    _ended: PreviousRound | None = None

    def begin(self) -> PreviousRound | None:
        """A round starts. Returns the previous round, if it came just before."""
        before, self._began = self._began, time.perf_counter()
        ended, self._ended, self._drafting = self._ended, None, 0.0
        tokens, self._learned = self._learned, 0
        if ended is None:
            return None
        return ended._replace(tokens=tokens, gap=min(self._began - before - ended.seconds, ended.seconds))

    def interrupt(self) -> None:
        """Something other than a round ran: the time until the next round says nothing about rounds."""
        self._ended = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def drafted(self, seconds: float) -> None:
        """`seconds` of this round went into a draft pass, its catch-up and what prolongs it."""
        self._drafting += seconds

    def learned(self, tokens: int) -> None:
        """A round turned out to have committed `tokens`."""
        self.tokens += tokens
        self._learned += tokens

    def end(self, rows: int, requests: int) -> float:
        """The round verified `rows` rows of `requests` requests. Returns its seconds."""
        self.rounds += 1
        self.rows += rows
        seconds = time.perf_counter() - self._began
        self.round_seconds += seconds
        self._ended = PreviousRound(rows, requests, 0, seconds, self._drafting, 0.0)
        return seconds

    def snapshot(self) -> dict[str, float | int]:
        """Totals for the metrics route and the benchmark."""
        return {
            "rounds": self.rounds,
            "rows": self.rows,
            "tokens": self.tokens,
            "switches": self.switches,
            "extra_catch_up_seconds": self.extra_catch_up_seconds,
            "round_seconds": self.round_seconds,
            **{f"{name}_seconds": value for name, value in self.seconds.items()},
        }

"""Where a round's time goes: its stages on the host's clock, the whole of it on the device's.

On a CPU these are the same. On a GPU, where launches return before the work is done, a stage's seconds are those of
launching it; a device-side breakdown needs the profiler. Whole rounds are timed there by events in the stream
(:mod:`whiflash_sglang.device.clock`), which are read when they have come: nobody waits for one.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from whiflash_sglang.device.clock import Clock, HostClock

STAGES = ("route", "catch_up", "draft", "verify", "commit", "park")


class RoundWork(NamedTuple):
    """What a round did: it verified `rows` rows of `requests` requests.

    context: tokens that these have together, at most. drafted: arm → requests that it drafted for. caught_up: arm →
    tokens that it ingested, at most.
    """

    rows: int
    requests: int
    context: int = 0
    drafted: Mapping[str, int] = {}
    caught_up: Mapping[str, int] = {}


class DraftTime(NamedTuple):
    """An arm drafted for so many requests in `passes` passes of its model. Host seconds, and those of its catch-up."""

    arm: str
    requests: int
    passes: int
    seconds: float
    catch_up: float = 0.0


class PreviousRound(NamedTuple):
    """A round that was timed.

    tokens: that were found committed since the round before it began. seconds: from its start to its end; drafting:
    part of them, on the host's clock, and `drafts` what of that was an arm's. gap: from its end to the next round's
    start, at most as long as itself: a longer one was a pause.
    """

    work: RoundWork
    tokens: int
    seconds: float
    drafting: float
    gap: float
    drafts: Sequence[DraftTime] = ()

    @property
    def rest(self) -> float:
        """Seconds that were no drafting."""
        return max(self.seconds - self.drafting, 1e-6)


class _Marks(NamedTuple):
    """A round that has ended on the host, by marks of the timer: its begin, its end, and the next round's begin."""

    work: RoundWork
    tokens: int
    drafting: float
    drafts: Sequence[DraftTime]
    begin: Any
    end: Any
    next_begin: Any


@dataclass(slots=True)
class RoundClock:
    """Totals since the start, in seconds, and what the cost model learns from the last round.

    timer: times whole rounds. seconds: per stage. rounds, rows: totals. round_seconds: of the stages and the time
    between them. tokens: committed. switches: rounds of a request drafted by another arm than its round before.
    extra_catch_up_seconds: part of the catch-up that a drafter used in every round would not have had.
    """

    timer: Clock = field(default_factory=HostClock)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    rounds: int = 0
    rows: int = 0
    round_seconds: float = 0.0
    tokens: int = 0
    switches: int = 0
    extra_catch_up_seconds: float = 0.0
    _began: float = 0.0
    _begin: Any = None
    _drafting: float = 0.0
    _drafts: list[DraftTime] = field(default_factory=list)
    _learned: int = 0
    _ended: _Marks | None = None
    _coming: deque[_Marks] = field(default_factory=deque)

    def begin(self) -> list[PreviousRound]:
        """A round starts. Returns the rounds before it that are timed by now, if each came just before its next."""
        self._began, self._begin = self.now(), self.timer.record()
        self._drafting, self._drafts = 0.0, []
        ended, self._ended = self._ended, None
        tokens, self._learned = self._learned, 0
        if ended is not None:
            self._coming.append(ended._replace(tokens=tokens, next_begin=self._begin))
        timed = []
        while self._coming and self.timer.passed(self._coming[0].next_begin):
            timed.append(self._timed(self._coming.popleft()))
        return timed

    def _timed(self, marks: _Marks) -> PreviousRound:
        seconds = self.timer.elapsed(marks.begin, marks.end)
        gap = min(self.timer.elapsed(marks.end, marks.next_begin), seconds)
        return PreviousRound(marks.work, marks.tokens, seconds, marks.drafting, gap, marks.drafts)

    def interrupt(self) -> None:
        """Something other than a round ran: the time until the next round says nothing about rounds."""
        self._ended = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - began

    @staticmethod
    def now() -> float:
        """Seconds on the host's clock."""
        return time.perf_counter()

    def drafted(self, draft: DraftTime) -> None:
        """An arm's drafts of this round are there."""
        self._drafts.append(draft)
        self._drafting += draft.seconds + draft.catch_up

    def proposed(self, seconds: float) -> None:
        """`seconds` of this round went into joining all arms' drafts and choosing among them."""
        self._drafting += seconds

    def learned(self, tokens: int) -> None:
        """A round turned out to have committed `tokens`."""
        self.tokens += tokens
        self._learned += tokens

    def end(self, work: RoundWork) -> float:
        """The round has issued everything. Returns its seconds on the host's clock."""
        self.rounds += 1
        self.rows += work.rows
        seconds = self.now() - self._began
        self.round_seconds += seconds
        self._ended = _Marks(work, 0, self._drafting, self._drafts, self._begin, self.timer.record(), None)
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

"""A round's time by stages on the host's clock, and the whole of it on the device's.

On a CPU these are the same. On a GPU, where launches return before the work is done, a stage's seconds are those of
launching it; a device-side breakdown needs the profiler. Whole rounds are timed there by events in the stream
(:mod:`whiflash_sglang.device.clock`), which are read when they have come: nobody waits for one.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from whiflash_sglang.device.clock import Clock, HostClock

STAGES = ("route", "catch_up", "draft", "verify", "commit", "park")


DraftTime = tuple[str, int, int, float, float]
"""Arguments of `RoundClock.drafted`."""


@dataclass(slots=True)
class RoundTime:
    """A round that verified `rows` rows of `requests` requests, and what it took."""

    # Filled by `Round.timed`.
    rows: int
    requests: int
    context: int = 0  # tokens that the requests have together, at most
    drafted: Mapping[str, int] = field(default_factory=dict)  # arm → requests that it drafted for
    caught_up: Mapping[str, int] = field(default_factory=dict)  # arm → tokens that it ingested, at most

    # Filled by `RoundClock.end`: marks of the timer, and host seconds.
    asked: Any = None
    begin: Any = None
    end: Any = None
    drafting: float = 0.0
    drafts: Sequence[DraftTime] = ()  # what of `drafting` was an arm's

    # Filled by `RoundClock.begin` of later rounds.
    next_begin: Any = None
    tokens: int = 0  # that were known to be committed since the round before it began
    seconds: float = 0.0  # from its begin to its end
    gap: float = 0.0  # while it was planned, and from its end on; at most `seconds`: a longer one was a pause

    @property
    def rest(self) -> float:
        """Seconds that were no drafting."""
        return max(self.seconds - self.drafting, 1e-6)


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
    _asked: Any = None
    _begin: Any = None
    _drafting: float = 0.0
    _drafts: list[DraftTime] = field(default_factory=list)
    _learned: int = 0
    _ended: RoundTime | None = None
    _coming: deque[RoundTime] = field(default_factory=deque)

    def begin(self) -> list[RoundTime]:
        """A round starts. Returns the rounds before it that are timed by now, if each came just before its next."""
        self._began, self._begin = self.now(), self.timer.record()
        self._asked = self._begin
        self._drafting, self._drafts = 0.0, []
        ended, self._ended = self._ended, None
        tokens, self._learned = self._learned, 0
        if ended is not None:
            ended.tokens, ended.next_begin = tokens, self._asked
            self._coming.append(ended)
        timed = []
        while self._coming and self.timer.passed(self._coming[0].next_begin):
            done = self._coming.popleft()
            done.seconds = self.timer.elapsed(done.begin, done.end)
            planned = self.timer.elapsed(done.asked, done.begin)
            done.gap = min(planned + self.timer.elapsed(done.end, done.next_begin), done.seconds)
            timed.append(done)
        return timed

    def planned(self) -> None:
        """The round's work begins: a device that has waited for its plan has waited for the host."""
        self._begin = self.timer.record()

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

    def drafted(self, arm: str, requests: int, passes: int, seconds: float, catch_up: float) -> None:
        """An arm drafted for so many requests, in `passes` passes of its model.

        seconds, catch_up: that its drafts, and its catch-up before, took of the host.
        """
        self._drafts.append((arm, requests, passes, seconds, catch_up))
        self._drafting += seconds + catch_up

    def proposed(self, seconds: float) -> None:
        """`seconds` of this round went into joining all arms' drafts and choosing among them."""
        self._drafting += seconds

    def learned(self, tokens: int) -> None:
        """A round turned out to have committed `tokens`."""
        self.tokens += tokens
        self._learned += tokens

    def end(self, time: RoundTime) -> float:
        """The round has issued everything. Returns its seconds on the host's clock."""
        self.rounds += 1
        self.rows += time.rows
        seconds = self.now() - self._began
        self.round_seconds += seconds
        time.drafting, time.drafts = self._drafting, self._drafts
        time.asked, time.begin, time.end = self._asked, self._begin, self.timer.record()
        self._ended = time
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

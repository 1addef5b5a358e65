"""Times a round's stages on the host's clock, and whole rounds on the device's clock.

On a CPU both are the same clock. On a GPU launches return before the work is done, so a stage's seconds are those of
launching it; a breakdown on the device needs the profiler. There whole rounds are timed by events in the stream
(:mod:`whiflash_sglang.device.clock`), which are read once they are done, without waiting.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from whiflash_sglang.device.clock import Clock

STAGES = ("route", "catch_up", "draft", "verify", "commit", "park")


@dataclass(slots=True)
class RoundTime:
    """Sizes and times of one round, which verified `rows` rows of `requests` requests."""

    # Filled by `Round.time`.
    rows: int
    requests: int
    context: int = 0  # tokens that the requests have together, at most
    drafted: Mapping[str, int] = field(default_factory=dict)  # arm → requests that it drafted for
    caught_up: Mapping[str, int] = field(default_factory=dict)  # arm → tokens that it ingested, at most
    limits: Mapping[str, int] = field(default_factory=dict)  # arm → drafts to which its pass was limited

    # Filled by `RoundClock.end`: marks of the timer.
    asked: Any = None
    begin: Any = None
    end: Any = None

    # Filled by `RoundClock.begin` of later rounds.
    next_begin: Any = None
    seconds: float = 0.0  # from its begin to its end
    # Seconds of planning before it and of waiting after it. At most `seconds`: a longer gap was a pause of the server.
    gap: float = 0.0

    tokens: int = -1  # committed by it; set by `RoundClock.learned`, under overlap while the next round runs


@dataclass(slots=True)
class RoundClock:
    """Times rounds: totals since the start, and each round's `RoundTime`, from which costs are learned.

    timer: times whole rounds. seconds: host seconds by stage. rounds, rows: numbers of rounds and verified rows.
    round_seconds: host seconds of whole rounds. tokens: committed tokens. switches: how often a request's arm changed
    from one round to the next. extra_catch_up_seconds: the part of catch-up that switching caused.
    """

    timer: Clock = field(default_factory=Clock)
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
    _ended: RoundTime | None = None
    _coming: deque[RoundTime] = field(default_factory=deque)

    def begin(self) -> list[RoundTime]:
        """Begin a round. Return earlier rounds whose times and tokens are known, but none before an interruption."""
        self._began, self._begin = self.now(), self.timer.record()
        self._asked = self._begin
        ended, self._ended = self._ended, None
        if ended is not None:
            ended.next_begin = self._asked
            self._coming.append(ended)
        timed = []
        while self._coming and self._coming[0].tokens >= 0 and self.timer.passed(self._coming[0].next_begin):
            done = self._coming.popleft()
            done.seconds = self.timer.elapsed(done.begin, done.end)
            planned = self.timer.elapsed(done.asked, done.begin)
            done.gap = min(planned + self.timer.elapsed(done.end, done.next_begin), done.seconds)
            timed.append(done)
        return timed

    def planned(self) -> None:
        """Mark the begin of the round's work after planning: a device that waited until now has waited for the host."""
        self._begin = self.timer.record()

    def interrupt(self) -> None:
        """Drop the last round's time: other work ran after it, so the time until the next round is no gap of rounds."""
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

    def learned(self, time: RoundTime, tokens: int) -> None:
        """Add the `tokens` that a round has committed. Rounds are learned in order; one left out gets no price."""
        self.tokens += tokens
        time.tokens = tokens
        while self._coming and self._coming[0].tokens < 0:
            self._coming.popleft()

    def end(self, time: RoundTime) -> float:
        """End the round: all its work is issued. Return its seconds on the host's clock."""
        self.rounds += 1
        self.rows += time.rows
        seconds = self.now() - self._began
        self.round_seconds += seconds
        time.asked, time.begin, time.end = self._asked, self._begin, self.timer.record()
        self._ended = time
        return seconds

    def snapshot(self) -> dict[str, float | int]:
        """Return the totals for the metrics route and the benchmark."""
        return {
            "rounds": self.rounds,
            "rows": self.rows,
            "tokens": self.tokens,
            "switches": self.switches,
            "extra_catch_up_seconds": self.extra_catch_up_seconds,
            "round_seconds": self.round_seconds,
            **{f"{name}_seconds": value for name, value in self.seconds.items()},
        }

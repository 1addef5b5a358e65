"""Series on their way out of the worker: at intervals, since writing them takes longer than counting."""

import time
from collections.abc import Callable
from typing import Protocol

from whiflash_sglang.metrics.series import SERIES, Labels, Series
from whiflash_sglang.metrics.state import Observed

INTERVAL = 1.0
"""Seconds between two writings while rounds run; when the last request has ended what is left is written at once."""


class Sink(Protocol):
    """Where series go."""

    def write(self, series: Series, labels: Labels, number: float) -> None:
        """Add to a counter, set a gauge, or let a histogram observe."""
        ...


class Publisher:
    """Writes what has changed. Does nothing until it has a sink.

    Args:
        worker: whose figures. now: seconds that never run backwards.
    """

    def __init__(self, worker: Observed, now: Callable[[], float] = time.monotonic) -> None:
        self._worker, self._now = worker, now
        self._sink: Sink | None = None
        self._written: dict[tuple[str, Labels], float] = {}
        self._due = 0.0

    def start(self, sink: Sink) -> None:
        """Write to `sink` from now on; every series that has a value has one there at once."""
        self._sink = sink
        self.flush()

    def tick(self) -> None:
        """A step is done: write if it is time."""
        if self._sink is not None and self._now() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write what has changed since the last time."""
        if self._sink is None:
            return
        for series in SERIES:
            for labels, number in series.read(self._worker):
                if series.kind == "histogram":
                    self._sink.write(series, labels, number)
                elif (before := self._written.get((series.name, labels))) != number:
                    self._written[series.name, labels] = number
                    self._sink.write(
                        series, labels, number - (before or 0.0) if series.kind == "counter" else number
                    )
        self._due = self._now() + INTERVAL

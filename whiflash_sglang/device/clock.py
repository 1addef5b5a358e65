"""Clocks that give marks and the seconds between two of them: the host's clock, or a device's events.

On a GPU a launch returns before its work is done, so the host's clock says how long launching took. An event is
recorded in the stream's order, and the time between two events can be read once the second is done, without waiting
before. `metrics` and `routing` take either clock.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPEATS = 5
"""Runs of which `measure` takes the median."""

LEAD = 8_000_000
"""Cycles, about four milliseconds on a GPU, that the device sleeps before a timed run. A host issues a round in less.

While serving, a round is issued while the round before it runs, so the time of issuing is no part of a price.
"""


class Clock:
    """The host's clock, for a CPU, where a call returns when its work is done. Only the clock that gave marks can
    compare them.
    """

    def record(self) -> Any:
        """Return a mark after all work that was issued until now on the current stream."""
        return time.perf_counter()

    def passed(self, mark: Any) -> bool:
        """Whether the work before `mark` is done, so that its time can be read without waiting."""
        return True

    def wait(self, mark: Any) -> None:
        """Wait until the work before `mark` is done."""

    def elapsed(self, begin: Any, end: Any) -> float:
        """Return the seconds from one mark to another; the work before both must be done."""
        return float(end - begin)

    def lead(self) -> None:
        """Keep the device busy while the host issues the work that is timed next."""


class EventClock(Clock):
    """Clock of one CUDA device, by CUDA events."""

    def __init__(self, device: "torch.device") -> None:
        from torch import cuda  # here, because code that only names the stages of a round needs no torch

        self._device, self._cuda = device, cuda

    def record(self) -> Any:
        event: Any = self._cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._cuda.current_stream(self._device))
        return event

    def passed(self, mark: Any) -> bool:
        return bool(mark.query())

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def elapsed(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000.0

    def lead(self) -> None:
        with self._cuda.device(self._device):
            self._cuda._sleep(LEAD)  # type: ignore[no-untyped-call]


def clock_of(device: "torch.device") -> Clock:
    """Return the clock that times work on `device`."""
    return EventClock(device) if device.type == "cuda" else Clock()


def measure(
    body: Callable[[], object], clock: Clock, *, repeats: int = REPEATS, of: Callable[[Sequence[float]], float] = median
) -> float:
    """Time `body` in seconds: `of` (the median) over `repeats` runs after one that is not counted; waits for each."""
    body()
    seconds = []
    for _ in range(repeats):
        clock.lead()
        begin = clock.record()
        body()
        end = clock.record()
        clock.wait(end)
        seconds.append(clock.elapsed(begin, end))
    return of(seconds)

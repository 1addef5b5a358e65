"""How much of a processor core a learner may use beside a server."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Pace:
    """Sleeps after work, so that this process uses a share of one core's time.

    Args:
        share: seconds of a processor for each second that passes; None: as many as there are.
        used, now: seconds of processors that this process has used, and a clock's. sleep: waits so many seconds.
        between: called at every rest, before it.
    """

    def __init__(
        self,
        share: float | None = None,
        *,
        between: Callable[[], object] = lambda: None,
        used: Callable[[], float] = time.process_time,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._share, self._between = share, between
        self._used, self._now, self._sleep = used, now, sleep
        self._began = used(), now()

    def rest(self) -> None:
        """Sleep for as long as the work since the last rest was beyond the share."""
        self._between()
        if self._share is not None:
            used, passed = self._used() - self._began[0], self._now() - self._began[1]
            self._sleep(max(0.0, used / self._share - passed))
        self._began = self._used(), self._now()

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with a rest after each."""
        for item in items:
            yield item
            self.rest()

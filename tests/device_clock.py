"""A device's clock that the test moves: an event has come when somebody waited for it, or the test says so."""

LEAD = 4.0
"""Seconds that the device sleeps before what is timed."""


class DeviceClock:
    """A mark is the device's time, in seconds. done: until when its work is. host: the host's time."""

    def __init__(self) -> None:
        self.now, self.done, self.host = 0.0, -1.0, 0.0

    def record(self) -> float:
        return max(self.now, self.host)

    def lead(self) -> None:
        self.now = self.record() + LEAD

    def issues(self, host: float, device: float) -> None:
        """The host takes `host` seconds to issue work of `device` seconds."""
        self.host += host
        self.now = self.record() + device

    def passed(self, mark: float) -> bool:
        return mark <= self.done

    def wait(self, mark: float) -> None:
        self.done = max(self.done, mark)
        self.host = max(self.host, mark)

    def elapsed(self, begin: float, end: float) -> float:
        if not (self.passed(begin) and self.passed(end)):
            raise AssertionError("read before it has come")
        return end - begin

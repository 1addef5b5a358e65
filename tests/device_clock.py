"""A device's clock that the test moves: an event has come when somebody waited for it, or the test says so."""


class DeviceClock:
    """A mark is the device's time, in seconds. done: until when its work is."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, -1.0

    def record(self) -> float:
        return self.now

    def passed(self, mark: float) -> bool:
        return mark <= self.done

    def wait(self, mark: float) -> None:
        self.done = max(self.done, mark)

    def elapsed(self, begin: float, end: float) -> float:
        if not (self.passed(begin) and self.passed(end)):
            raise AssertionError("read before it has come")
        return end - begin

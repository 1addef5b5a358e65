"""How slow this machine is, and the one limit of the tests on time, which scales with it.

Tests wait for events: a process ended, a port answers, a file exists. Such a wait has no limit of its own. An event
that never happens ends the test at pytest's limit for it (`timeout` in pyproject.toml, or its mark), which is meant for
a quiet machine and lasts as many times longer as a fixed piece of work does here: measured at the start of the run, and
again whenever a limit is reached, since neighbours come and go.
"""

import functools
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

NOMINAL_SECONDS = 0.25
"""Seconds that the piece of work takes on one quiet core of a server of 2023."""

LONGEST_PAUSE = 1.0


def slowness() -> float:
    """How many times longer than nominal a fixed piece of work takes now; never below 1."""
    began, total = time.perf_counter(), 0
    for i in range(4_000_000):
        total += i * i
    return max(1.0, (time.perf_counter() - began) / NOMINAL_SECONDS)


at_start = functools.cache(slowness)


def wait_until(condition: Callable[[], Any]) -> Any:
    """Return what `condition` gives once it holds. Asks often at first, every second later."""
    pause = 0.02
    while not (found := condition()):
        time.sleep(pause)
        pause = min(1.2 * pause, LONGEST_PAUSE)
    return found


def within(seconds: float, over: Callable[[float], Any]) -> bool:
    """Whether `over` is true before so many seconds of a quiet machine have passed.

    A machine that stands still as a whole, as one that is suspended, has no time pass meanwhile.

    Args:
        over: waits for as many seconds as it is told, or until it is true.
    """
    spent, slowest = 0.0, at_start()
    while not over(LONGEST_PAUSE):
        spent += LONGEST_PAUSE
        if spent >= seconds * slowest:
            slowest = max(slowest, slowness())
            if spent >= seconds * slowest:
                return False
    return True


def pytest_report_header() -> str:
    return f"slowness: {at_start():.1f} (time limits are as many times longer)"


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """The alarm of a test rings when its limit has passed on a machine as slow as this one is then."""
    if settings.method != "signal" or threading.current_thread() is not threading.main_thread():
        return None
    from pytest_timeout import timeout_sigalrm

    began, slowest = time.monotonic(), at_start()

    def overdue(*_: Any) -> None:
        nonlocal slowest
        slowest = max(slowest, slowness())
        left = began + settings.timeout * slowest - time.monotonic()
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, left)
        else:
            timeout_sigalrm(item, settings)

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    item.cancel_timeout = cancel  # type: ignore[attr-defined]
    signal.signal(signal.SIGALRM, overdue)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout * slowest)
    return True

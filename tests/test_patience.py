"""The limit of a test scales with how slow the machine is, at the start and later; what never happens is ended."""

import os
import subprocess
import sys
from pathlib import Path

import patience
import pytest

CONFTEST = """
import sys
sys.path.insert(0, {tests!r})
import patience
patience.at_start = lambda: {at_start}
patience.slowness = lambda: {later}
from patience import pytest_timeout_set_timer
"""
LATE = "import time\ndef test_late(): time.sleep(0.5)\n"
NEVER = "from patience import wait_until\ndef test_never(): wait_until(lambda: False)\n"


@pytest.mark.parametrize(
    ("body", "at_start", "later", "outcome"),
    [
        (LATE, 1, 1000, "1 passed"),
        (LATE, 1000, 1, "1 passed"),
        (LATE, 1, 1, "Timeout"),
        (NEVER, 1, 3, "Timeout"),
    ],
    ids=["became busy", "busy from the start", "too late", "never"],
)
def test_a_limit_lasts_as_long_as_the_machine_is_slow(
    tmp_path: Path, body: str, at_start: int, later: int, outcome: str
) -> None:
    tests = str(Path(patience.__file__).parent)
    (tmp_path / "conftest.py").write_text(CONFTEST.format(tests=tests, at_start=at_start, later=later))
    (tmp_path / "test_it.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-p", "pytest_timeout", "-o", "timeout=0.2", "test_it.py"]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert outcome in done.stdout, done.stdout + done.stderr


def test_no_machine_shortens_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "NOMINAL_SECONDS", 1e9)
    assert patience.slowness() == 1.0


@pytest.mark.parametrize(
    ("at_start", "later", "pauses"),
    [(1.0, 1.0, 3), (2.0, 1.0, 6), (1.0, 4.0, 12)],
    ids=["quiet", "busy from the start", "became busy"],
)
def test_what_is_waited_for_has_as_many_pauses_as_the_machine_is_slow(
    monkeypatch: pytest.MonkeyPatch, at_start: float, later: float, pauses: int
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(patience, "at_start", lambda: at_start)
    monkeypatch.setattr(patience, "slowness", lambda: later)
    assert not patience.within(3.0, asked.append)
    assert asked == [patience.LONGEST_PAUSE] * pauses
    assert patience.within(3.0, lambda _: len(asked) == pauses)

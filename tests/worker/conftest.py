"""Counters for tests of the worker."""

from collections.abc import Sequence
from typing import Any

import pytest


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rounds of every step, however long they take."""
    from whiflash_sglang.serve import worker

    found: list[int] = []

    def counted(rounds: Sequence[Any], result: Any = worker.step_result) -> Any:
        found.append(len(rounds))
        return result(rounds)

    monkeypatch.setattr(worker, "step_result", counted)
    monkeypatch.setattr(worker, "STEP_SECONDS", float("inf"))
    return found

"""Tiny checkpoints shared by the tests of the worker."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from model_set import Models, build_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rounds of every step, however long they take."""
    from whiflash_sglang import worker

    found: list[int] = []

    def counted(rounds: Sequence[Any], result: Any = worker.step_result) -> Any:
        found.append(len(rounds))
        return result(rounds)

    monkeypatch.setattr(worker, "step_result", counted)
    monkeypatch.setattr(worker, "STEP_SECONDS", float("inf"))
    return found

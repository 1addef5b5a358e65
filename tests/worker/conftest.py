"""Counters for tests of the worker, and adapters of their target."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from adapters import Adapter
    from model_set import Models


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


@pytest.fixture(scope="session")
def adapters(models: "Models", tmp_path_factory: pytest.TempPathFactory) -> "dict[str, Adapter]":
    from adapters import ATTENTION, make_adapter

    root = tmp_path_factory.mktemp("adapters")
    made = (
        make_adapter(models, root, "one", seed=1, rank=4),
        make_adapter(models, root, "two", seed=2, rank=8, modules=ATTENTION),
        make_adapter(models, root, "three", seed=3, rank=2),
    )
    return {adapter.name: adapter for adapter in made}

"""The stages of a round add up to it. By the operators that it issues, which no neighbour on the machine slows down."""

import time
from typing import Any

import pytest
from engine import engine
from model_set import Models
from torch.utils._python_dispatch import TorchDispatchMode

from whiflash_lab.bench.cells import round_ms_of


class Issued(TorchDispatchMode):
    """Counts operators that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_nothing_of_a_round_is_in_no_stage(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    issued = Issued()
    monkeypatch.setattr(time, "perf_counter", lambda: float(issued.count))
    with engine(models.target, whiflash=models.whiflash("random")) as e:
        with issued:
            e.generate([[1, 2, 3], [4, 5, 6, 7]], max_new_tokens=40)
        stages = round_ms_of(e.worker.clock.snapshot())
    assert stages.draft > 0
    assert stages.verify > 0
    assert min(stages.model_dump().values()) >= -1e-6  # what rounding leaves of nothing
    assert stages.other == pytest.approx(0, abs=1e-6)

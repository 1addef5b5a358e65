"""The stages of a round add up to it. By the operators that it issues, which no neighbour on the machine slows down."""

import time

import pytest
from engine import engine
from host_reads import Launches
from model_set import Models

from whiflash_lab.bench.cells import round_ms_of


def test_nothing_of_a_round_is_in_no_stage(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    issued = Launches()
    monkeypatch.setattr(time, "perf_counter", lambda: float(issued.count))
    with engine(models.target, whiflash=models.whiflash("random")) as e:
        with issued:
            e.generate([[1, 2, 3], [4, 5, 6, 7]], max_new_tokens=40)
        stages = round_ms_of(e.worker.clock.snapshot())
    assert stages.draft > 0
    assert stages.verify > 0
    assert min(stages.model_dump().values()) >= -1e-6  # what rounding leaves of nothing
    assert stages.other == pytest.approx(0, abs=1e-6)

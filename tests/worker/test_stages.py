"""The stages of a round add up to it. By the thread's own time: what neighbours take is in no stage."""

import time

import pytest
from engine import engine
from model_set import Models

from whiflash_sglang.bench.rounds import round_ms_of


def test_hardly_anything_of_a_round_is_in_no_stage(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    with engine(models.target, whiflash=models.whiflash("random")) as e:
        e.generate([[1, 2, 3], [4, 5, 6, 7]], max_new_tokens=40)
        stages = round_ms_of(e.worker.clock.snapshot())
    assert min(stages.model_dump().values()) >= 0
    assert stages.draft > 0
    assert stages.other <= 0.05 * stages.total

"""The test engine gives back what it takes: a suite starts a hundred of them in one process."""

import gc
import os
import weakref
from pathlib import Path

import pytest
from engine import engine
from model_set import Models
from patience import wait_until


def held() -> tuple[int, int]:
    """Threads of this process, native ones too, and its open files.

    Wait for it: the system lists a thread for a moment longer than whoever joined it waits.
    """
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def start_and_stop(models: Models) -> list[weakref.ref[object]]:
    """References to what is large: the scheduler, the worker, the weights, the KV pool."""
    with engine(models.target, whiflash=models.whiflash("random"), skip_tokenizer_init=False) as e:
        e.generate([[1, 2, 3, 4]], max_new_tokens=8)
        runner = e.scheduler.tp_worker.model_runner
        return [weakref.ref(o) for o in (e.scheduler, e.worker, runner.model, runner.token_to_kv_pool)]


def test_an_engine_leaves_nothing_behind(models: Models) -> None:
    start_and_stop(models)  # what SGLang and torch build once stays
    before = held()
    for _ in range(3):
        large = start_and_stop(models)
        wait_until(lambda: held() == before)
        assert [reference() for reference in large] == [None] * 4


def test_a_start_that_fails_leaves_nothing_behind(models: Models, tmp_path: Path) -> None:
    def fail() -> None:
        flags = models.whiflash("random") | {"whiflash_eagle_draft": str(tmp_path)}
        with pytest.raises(Exception, match=str(tmp_path)), engine(models.target, whiflash=flags):
            pass

    start_and_stop(models)
    fail()
    before = held()
    fail()
    wait_until(lambda: held() == before)

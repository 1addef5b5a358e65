"""Ranks on one machine without an accelerator get cores and threads of their own."""

import os

import pytest

from whiflash_cpu import cpu

CORES, THREADS = "SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"


@pytest.mark.parametrize(
    ("ranks", "cores", "named", "threads"),
    [(2, [0, 1, 2, 3], "0,1|2,3", "2"), (2, [4, 5, 6], "4|5", "1"), (3, [0, 1], "0|1|0", "1")],
)
def test_cores_are_split_over_the_ranks(ranks: int, cores: list[int], named: str, threads: str) -> None:
    assert cpu.shared_cores(ranks, cores) == {CORES: named, THREADS: threads}


def test_a_second_engine_of_a_process_may_have_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS, "7")
    monkeypatch.delenv(CORES, raising=False)
    for ranks in (2, 4, 3):
        cpu.share_cores(ranks)
        assert os.environ[CORES].count("|") == ranks - 1
    cpu.share_cores(1)
    assert CORES not in os.environ
    assert os.environ[THREADS] == "7", "the user's"


def test_cores_that_the_user_names_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORES, "0|0")
    cpu.share_cores(2)
    assert os.environ[CORES] == "0|0"
    monkeypatch.delenv(THREADS, raising=False)
    cpu.share_cores(1)

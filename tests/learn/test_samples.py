"""Samples on disk: whole files within their bounds, nobody waits for them, and who is forgotten leaves none."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.config import parse_flags, resolve
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.learn import samples
from whiflash_sglang.learn.samples import (
    Sample,
    Spool,
    Spooling,
    check_spool,
    files_of,
    forget_samples,
    prune,
    read_samples,
)

TARGET = "a target"


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spool:
    """One whose thread never comes to write: `flush` does."""
    monkeypatch.setattr(samples, "SECONDS", 1e6)
    check_spool(tmp_path / "samples")
    return Spool(Spooling(directory=tmp_path / "samples", mib=1, hours=1), TARGET, Clock())


def kept(directory: Path) -> list[Sample]:
    return [sample for file in files_of(directory) for sample in read_samples(file.path, TARGET)]


def directory_of(spool: Spool) -> Path:
    return spool._directory


def test_a_finished_request_is_read_back(spool: Spool) -> None:
    spool.offer([1, 2], [3], {7, 5})
    spool.offer([4], [5, 6])
    spool.flush()
    assert kept(directory_of(spool)) == [Sample([1, 2], [3], [5, 7]), Sample([4], [5, 6], [])]
    assert spool.counts["written"] == 2
    assert spool.size == sum(file.size for file in files_of(directory_of(spool)))


def test_its_thread_writes_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    replace = samples.prune

    def pruned(*args: Any) -> int:
        size = replace(*args)
        written.set()
        return size

    monkeypatch.setattr(samples, "SECONDS", 0.0)
    monkeypatch.setattr(samples, "prune", pruned)
    Spool(Spooling(directory=tmp_path), TARGET).offer([1], [2])
    assert written.wait(30)
    assert kept(tmp_path) == [Sample([1], [2], [])]


def test_only_their_owner_reads_them(spool: Spool) -> None:
    spool.offer([1], [2])
    spool.flush()
    assert directory_of(spool).stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory_of(spool).iterdir()} == {0o600}


def test_files_stay_within_their_bytes_and_the_newest_stay(spool: Spool) -> None:
    for number in range(40):
        spool.offer([number] * 10, [10_000] * 10_000)
        spool.flush()
    found = [sample.prompt[0] for sample in kept(directory_of(spool))]
    assert found == list(range(40 - len(found), 40))
    assert 10 < len(found) < 20
    assert spool.size <= 1 << 20


def test_old_files_go(spool: Spool) -> None:
    spool.offer([1], [2])
    spool.flush()
    spool._now.now += 3601  # type: ignore[attr-defined]
    spool.offer([3], [4])
    spool.flush()
    assert kept(directory_of(spool)) == [Sample([3], [4], [])]


def test_more_than_can_be_written_is_dropped_and_counted(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "WAITING", 10)
    spool.offer([1] * 5, [2] * 5)
    spool.offer([3], [4])
    spool.flush()
    spool.offer([5], [6])
    spool.flush()
    assert [sample.prompt for sample in kept(directory_of(spool))] == [[1] * 5, [5]]
    assert (spool.counts["written"], spool.counts["dropped"]) == (2, 1)


def test_a_full_disk_leaves_whole_files_one_line_and_a_server(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool.offer([1], [2])
    spool.flush()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for _ in range(3):
            spool.offer([3], [4])
            spool.flush()
    assert [record.getMessage() for record in caplog.records if "No space" in record.getMessage()] != []
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert spool.failing
    assert spool.snapshot()["failed"] == 3
    assert not list(directory_of(spool).glob("*.part"))
    spool.offer([5], [6])
    spool.flush()
    assert not spool.failing
    assert [sample.prompt for sample in kept(directory_of(spool))] == [[1], [5]]


def test_what_a_killed_writer_left_goes(spool: Spool) -> None:
    (directory_of(spool) / "00000000000000000001-1.part").write_text('{"format":')
    spool.offer([1], [2])
    spool.flush()
    assert not list(directory_of(spool).glob("*.part"))


@pytest.mark.parametrize(("handle", "left"), [(7, [2, 3, 4]), (8, [1, 3, 4]), (9, [1, 2, 3, 4]), (None, [])])
def test_who_is_forgotten_leaves_nothing(spool: Spool, handle: int | None, left: list[int]) -> None:
    """Neither on disk nor in what waits, and others' samples stay."""
    spool.offer([1], [1], {7, 70})
    spool.offer([2], [2], {8})
    spool.flush()
    spool.offer([3], [3])
    spool.flush()
    spool.offer([1], [1], {7})
    spool.offer([4], [4])
    spool.forget(handle)
    forget_samples(directory_of(spool), handle)
    spool.flush()
    found = [sample.prompt[0] for sample in kept(directory_of(spool))]
    assert sorted(set(found)) == left
    for file in files_of(directory_of(spool)):
        assert handle not in json.loads(file.path.read_text().splitlines()[0])["handles"]


def test_forgetting_drops_what_nobody_can_read(spool: Spool) -> None:
    torn = directory_of(spool) / "00000000000000000001-1.jsonl"
    torn.write_text("{")
    forget_samples(directory_of(spool), 7)
    assert not torn.exists()


def test_samples_of_another_target_are_not_read(spool: Spool) -> None:
    spool.offer([1], [2])
    spool.flush()
    [file] = files_of(directory_of(spool))
    assert read_samples(file.path, "another") == []
    file.path.write_text("{")
    with pytest.raises(ConfigError, match="holds no samples"):
        read_samples(file.path, TARGET)
    file.path.unlink()
    assert read_samples(file.path, TARGET) == []


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    check_spool(tmp_path / "samples")
    (tmp_path / "samples" / ".lock").unlink()
    (tmp_path / "elsewhere").write_text("as it was")
    (tmp_path / "samples" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="--whiflash-learn"):
        check_spool(tmp_path / "samples")
    assert (tmp_path / "elsewhere").read_text() == "as it was"


def test_pruning_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("mine")
    assert prune(tmp_path, Spooling(directory=tmp_path), 1e9) == 0
    assert (tmp_path / "README").exists()


def test_flags(tmp_path: Path) -> None:
    bundle = embedded_bundle()
    assert resolve(parse_flags({}), bundle).samples == Spooling()
    found = resolve(parse_flags({"learn": str(tmp_path), "learn_mib": 5}), bundle)
    assert found.samples == Spooling(directory=tmp_path / "samples", mib=5)
    assert found.target == "embedded:smollm2-135m-instruct"
    with pytest.raises(ConfigError, match="--whiflash-learn-hours does something only with --whiflash-learn"):
        resolve(parse_flags({"learn_hours": 5}), bundle)
    with pytest.raises(ConfigError, match="forced text is not the target's"):
        resolve(parse_flags({"learn": str(tmp_path), "force_recorded": "on"}), bundle)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        resolve(parse_flags({"learn": str(tmp_path / "file")}), bundle)

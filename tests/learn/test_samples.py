"""Samples on disk: whole files within their bounds, nobody waits for them, and who is forgotten leaves none."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from filelock import Timeout
from patience import wait_until

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.settings.config import parse_flags, resolve
from whiflash_sglang.telemetry import samples

TARGET = "a target"


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> samples.Spool:
    """One whose thread never comes to write: `flush` does."""
    monkeypatch.setattr(samples, "SECONDS", 1e6)
    samples.check_spool(tmp_path / "samples")
    return samples.Spool(samples.Spooling(directory=tmp_path / "samples", mib=1, hours=1), TARGET)


def kept(directory: Path) -> list[samples.Sample]:
    return [sample for file in samples.files_of(directory) for sample in samples.read_samples(file, TARGET)]


def write(spool: samples.Spool, *request: Any) -> None:
    spool.offer(*request)
    spool.flush()


def directory_of(spool: samples.Spool) -> Path:
    return spool._directory


def test_a_finished_request_is_read_back(spool: samples.Spool) -> None:
    (directory_of(spool) / ".writing-killed").mkdir()  # its writer was killed
    spool.offer([1, 2], [3], [7, 5])
    write(spool, [4], [5, 6])
    assert kept(directory_of(spool)) == [samples.Sample([1, 2], [3], [7, 5]), samples.Sample([4], [5, 6], [])]
    assert spool.counts["written"] == 2
    assert spool.size == sum(samples.files_of(directory_of(spool)).values())
    assert not list(directory_of(spool).glob(".writing-*"))


def test_its_thread_writes_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "SECONDS", 0.0)
    samples.Spool(samples.Spooling(directory=tmp_path), TARGET).offer([1], [2])
    wait_until(lambda: kept(tmp_path) == [samples.Sample([1], [2], [])])


def test_only_their_owner_reads_them(spool: samples.Spool) -> None:
    """Also after somebody removed the directory."""
    for again in (lambda: write(spool, [1], [2]), lambda: samples.forget_samples(directory_of(spool), None)):
        shutil.rmtree(directory_of(spool), ignore_errors=True)
        again()
        assert directory_of(spool).stat().st_mode & 0o777 == 0o700
    write(spool, [1], [2])
    assert {path.stat().st_mode & 0o777 for path in directory_of(spool).iterdir()} == {0o600}


def test_files_stay_within_their_bytes_and_the_newest_stay(spool: samples.Spool) -> None:
    for number in range(40):
        write(spool, [number] * 10, [10_000] * 10_000)
    found = [sample.prompt[0] for sample in kept(directory_of(spool))]
    assert found == list(range(40 - len(found), 40))
    assert 10 < len(found) < 20
    assert spool.size <= 1 << 20


def test_old_files_go(spool: samples.Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "time", clock := Mock(time=Mock(return_value=1e9)))
    write(spool, [1], [2])
    clock.time.return_value += 3601
    write(spool, [3], [4])
    assert kept(directory_of(spool)) == [samples.Sample([3], [4], [])]
    clock.time.return_value += 3601
    spool.flush()  # also without a new one
    assert kept(directory_of(spool)) == []


def test_more_than_can_be_written_is_dropped_and_counted(spool: samples.Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "WAITING", 10)
    spool.offer([1] * 5, [2] * 5)
    write(spool, [3], [4])
    write(spool, [5], [6])
    assert [sample.prompt for sample in kept(directory_of(spool))] == [[1] * 5, [5]]
    assert (spool.counts["written"], spool.counts["dropped"]) == (2, 1)


def test_a_full_disk_leaves_whole_files_one_line_and_a_server(
    spool: samples.Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(spool, [1], [2])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for _ in range(3):
            write(spool, [3], [4])
    assert [record.getMessage() for record in caplog.records if "No space" in record.getMessage()] != []
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert spool.failing
    assert spool.snapshot()["failed"] == 3
    assert not list(directory_of(spool).glob(".writing-*"))
    write(spool, [5], [6])
    assert not spool.failing
    assert [sample.prompt for sample in kept(directory_of(spool))] == [[1], [5]]


@pytest.mark.parametrize(("handle", "left"), [(7, [2, 3, 4]), (8, [1, 3, 4]), (9, [1, 2, 3, 4]), (None, [])])
def test_who_is_forgotten_leaves_nothing(spool: samples.Spool, handle: int | None, left: list[int]) -> None:
    """Neither on disk nor in what waits, and others' samples stay."""
    spool.offer([1], [1], {7, 70})
    write(spool, [2], [2], {8})
    write(spool, [3], [3])
    spool.offer([1], [1], {7})
    spool.offer([4], [4])
    spool.forget(handle)
    samples.forget_samples(directory_of(spool), handle)
    spool.flush()
    found = [sample.prompt[0] for sample in kept(directory_of(spool))]
    assert sorted(set(found)) == left
    for file in samples.files_of(directory_of(spool)):
        assert handle not in json.loads(file.read_text().splitlines()[0])["handles"]


@pytest.mark.parametrize("handle", [7, None])
def test_forgetting_drops_what_nobody_can_read(spool: samples.Spool, handle: int | None) -> None:
    """The owner of a file that was being written when its writer was killed is unknown, too."""
    (directory_of(spool) / ".writing-killed").mkdir()
    for name in ("00000000000000000001-1.jsonl", ".writing-killed/00000000000000000002-1.jsonl"):
        (directory_of(spool) / name).write_text("{")
    for handles in ("[[1], 7]", '["7", 3]', "[null]"):
        write(spool, [1], [1], {7, 8})
        with [*samples.files_of(directory_of(spool))][-1].open("a") as file:
            file.write(f'{{"prompt":[1],"answer":[1],"handles":{handles}}}\n')
    samples.forget_samples(directory_of(spool), handle)
    assert [path.name for path in directory_of(spool).iterdir()] == [".lock"]


def test_forgetting_goes_on_where_a_file_cannot_be_written_again(
    spool: samples.Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        spool.offer([1], [1], {7})
        write(spool, [2], [2], {8})
    monkeypatch.setattr(samples, "_replace", Mock(side_effect=OSError(errno.ENOSPC, "a full disk")))
    samples.forget_samples(directory_of(spool), 7)
    assert kept(directory_of(spool)) == []


def test_forgetting_waits_for_no_disk_and_the_writer_drops_what_was_forgotten(spool: samples.Spool) -> None:
    """Somebody holds the directory's lock, and the writer waits for it with the samples that it has taken."""
    spool.offer([1], [1], [7])
    spool.offer([2], [2])
    writer = threading.Thread(target=spool.flush)
    with samples.locked(directory_of(spool)):
        writer.start()
        wait_until(lambda: spool._taken)
        forgetting = threading.Thread(target=spool.forget, args=(7,), daemon=True)
        forgetting.start()
        forgetting.join(60)
        assert not forgetting.is_alive()
        assert writer.is_alive()
    writer.join()
    assert [sample.prompt for sample in kept(directory_of(spool))] == [[2]]


def test_nobody_writes_while_samples_are_forgotten(spool: samples.Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    files_of = samples.files_of

    def files(directory: Path) -> dict[Path, int]:
        with pytest.raises(Timeout):
            samples.locked(directory).acquire(blocking=False)
        return files_of(directory)

    monkeypatch.setattr(samples, "files_of", files)
    samples.forget_samples(directory_of(spool), 7)


def test_what_waits_is_counted_after_forgetting(spool: samples.Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "WAITING", 10)
    spool.offer([1] * 4, [1], [7])
    spool.offer([2] * 4, [2])
    spool.forget(7)
    spool.offer([3] * 5, [3])
    write(spool, [4] * 4, [4])
    assert [sample.prompt[0] for sample in kept(directory_of(spool))] == [2, 4]


def test_samples_of_another_target_are_not_read(spool: samples.Spool) -> None:
    write(spool, [1], [2])
    [file] = samples.files_of(directory_of(spool))
    assert samples.read_samples(file, "another") == []
    file.write_text("{")
    with pytest.raises(ConfigError, match="holds no samples"):
        samples.read_samples(file, TARGET)
    file.unlink()
    assert samples.read_samples(file, TARGET) == []


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    samples.check_spool(tmp_path / "samples")
    (tmp_path / "samples" / ".lock").unlink()
    (tmp_path / "elsewhere").write_text("as it was")
    (tmp_path / "samples" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="--whiflash-learn"):
        samples.check_spool(tmp_path / "samples")
    (tmp_path / "samples" / ".lock").unlink()
    (tmp_path / "samples" / f"{10**18:020d}-{os.getpid()}.jsonl").symlink_to(tmp_path / "elsewhere")
    samples.write_file(tmp_path / "samples", TARGET, [samples.Sample([1], [2], [])], 1e9)
    assert (tmp_path / "elsewhere").read_text() == "as it was"


def test_a_spool_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "samples"
    samples.check_spool(directory)
    for mode in (0o777, 0o750, 0o701):
        directory.chmod(mode)
        with pytest.raises(ConfigError, match=f"has mode {mode:o}.*`chmod 700`"):
            samples.check_spool(directory)
    directory.chmod(0o700)
    (tmp_path / "link").symlink_to(directory)
    with pytest.raises(ConfigError, match="but a link"):
        samples.check_spool(tmp_path / "link")


HEADER = '{"format":1,"target":"a target","handles":[7]}'
LINE = '{"prompt":[1],"answer":[2],"handles":[7]}'
PROMPTS = ("[-1]", "[2147483648]", f"[1{'0' * 5000}]", "[1.5]", "[NaN]", "[true]", '["1"]', "[[1]]", "1", "[" * 100_000)
OTHERS = (LINE.replace("[7]", "[8]"), LINE.replace("[7]", "[-1]"), LINE.replace("{", '{"x":1,'))
LINES = (*(LINE.replace("[1]", prompt) for prompt in PROMPTS), *OTHERS, "[]", "[[1],[2],[7]]", "")
HEADERS = (HEADER.replace('"a target"', "1"), HEADER.replace("[7]", "7"), "[" * 100_000)


@pytest.mark.parametrize(
    ("header", "line"), [*((HEADER, line) for line in LINES), *((header, LINE) for header in HEADERS)]
)
def test_planted_lines_are_refused_by_name(spool: samples.Spool, header: str, line: str) -> None:
    """They may be of any type and range; nobody knows whose they are, so they go with whoever is forgotten."""
    planted = directory_of(spool) / "00000000000000000001-1.jsonl"
    planted.touch(0o600)
    planted.write_text(f"{header}\n{LINE}\n{line}\n")
    with pytest.raises(ConfigError, match=r"00001-1\.jsonl holds no samples"):
        samples.read_samples(planted, TARGET)
    planted.write_text(f"{HEADER}\n{LINE}\n{LINE}\n")
    assert len(samples.read_samples(planted, TARGET)) == 2


def test_files_of_others_are_refused(spool: samples.Spool, tmp_path: Path) -> None:
    planted = directory_of(spool) / "00000000000000000001-1.jsonl"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch(0o600)
    elsewhere.write_text(f"{HEADER}\n{LINE}\n")
    planted.symlink_to(elsewhere)
    assert samples.files_of(directory_of(spool)) == {}
    with pytest.raises(OSError, match="symbolic link"):
        samples.read_samples(planted, TARGET)
    planted.unlink()
    os.mkfifo(planted, 0o600)
    assert samples.files_of(directory_of(spool)) == {}
    with pytest.raises(ConfigError, match="no regular file"):
        samples.read_samples(planted, TARGET)
    planted.unlink()
    elsewhere.rename(planted)
    planted.chmod(0o604)
    with pytest.raises(ConfigError, match=r"has mode 604.*`chmod 600`"):
        samples.read_samples(planted, TARGET)


def test_pruning_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("mine")
    assert samples.prune(tmp_path, samples.Spooling(directory=tmp_path), 1e9) == 0
    assert (tmp_path / "README").exists()


def test_pruning_drops_what_a_clock_dated_ahead_before_what_is_new(tmp_path: Path) -> None:
    now, new = 1e9, f"{10**18:020}-1.jsonl"
    for name in (new, f"{2 * 10**18:020}-1.jsonl"):
        (tmp_path / name).write_bytes(bytes(700_000))
        (tmp_path / name).chmod(0o600)
    assert samples.prune(tmp_path, samples.Spooling(directory=tmp_path, mib=1), now) == 700_000
    assert [path.name for path in tmp_path.iterdir()] == [new]


def test_flags(tmp_path: Path) -> None:
    bundle = embedded_bundle()
    assert resolve(parse_flags({}), bundle).samples == samples.Spooling()
    found = resolve(parse_flags({"learn": str(tmp_path), "learn_mib": 5}), bundle)
    assert found.samples == samples.Spooling(directory=tmp_path / "samples", mib=5)
    assert found.target == "embedded:smollm2-135m-instruct"
    with pytest.raises(ConfigError, match="--whiflash-learn-hours does something only with --whiflash-learn"):
        resolve(parse_flags({"learn_hours": 5}), bundle)
    with pytest.raises(ConfigError, match="forced text is not the target's"):
        resolve(parse_flags({"learn": str(tmp_path), "force_recorded": "on"}), bundle)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        resolve(parse_flags({"learn": str(tmp_path / "file")}), bundle)

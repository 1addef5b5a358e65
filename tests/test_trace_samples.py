"""Sampled traces on disk: whole lines in files of bounded size, and nobody waits or fails for them."""

import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.cli.report import by_caller
from whiflash_sglang.cli.trace import turns_of
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.settings.config import Flags, parse_flags, resolve
from whiflash_sglang.telemetry import trace
from whiflash_sglang.telemetry.trace import PARTS, SampleFiles, Sampler

LINE = b'{"number": 12345}\n'


def lines(directory: Path) -> list[bytes]:
    """All lines, oldest first."""
    names = [*(f"traces.{number}.jsonl" for number in range(PARTS - 1, 0, -1)), "traces.jsonl"]
    paths = [directory / name for name in names]
    return b"".join(path.read_bytes() for path in paths if path.exists()).splitlines(keepends=True)


def test_files_stay_within_their_bound_and_the_newest_lines_stay(tmp_path: Path) -> None:
    files = SampleFiles(tmp_path, 40 * len(LINE))
    for number in range(10000, 10500):
        files.append(LINE.replace(b"12345", str(number).encode()))
    found = [json.loads(line)["number"] for line in lines(tmp_path)]
    assert found == list(range(10500 - len(found), 10500))
    assert 30 <= len(found) <= 40
    assert len(list(tmp_path.glob("traces*"))) == PARTS


def test_only_their_owner_reads_them(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "here"
    trace.check_directory(directory)
    SampleFiles(directory, 1 << 20).append(LINE)
    trace.check_directory(directory)
    assert lines(directory) == [LINE]
    SampleFiles(directory, 1 << 20).append(LINE)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_processes_share_a_directory(tmp_path: Path) -> None:
    """As several processes of one server do: each opens, locks and turns the files by itself."""
    writers = [SampleFiles(tmp_path, 4 << 20) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda writer: [writer.append(LINE) for _ in range(100)], writers))
    assert lines(tmp_path) == [LINE] * 400


@pytest.mark.parametrize(
    ("torn", "whole"), [(b'{"numb', 1), (b'{"number": 12345}\n{"nu', 2), (b'{"number": 12345}', 1)]
)
def test_what_a_crash_left_of_a_line_is_cut_off(tmp_path: Path, torn: bytes, whole: int) -> None:
    file = tmp_path / "traces.jsonl"
    file.touch(0o600)
    file.write_bytes(LINE + torn)
    SampleFiles(tmp_path, 1 << 20).append(LINE)
    assert lines(tmp_path) == [LINE] * (whole + 1)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, write = SampleFiles(tmp_path, 1 << 20), os.write
    files.append(LINE)
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
    with pytest.raises(OSError, match="No space"):
        files.append(LINE)
    monkeypatch.setattr(os, "write", write)
    files.append(LINE)
    assert lines(tmp_path) == [LINE] * 2


OF_OTHERS: dict[str, Callable[[Path, Path], object]] = {
    "is a link": lambda file, other: file.symlink_to(other),
    "is another file, too": lambda file, other: file.hardlink_to(other),
    "waits for a reader": lambda file, _: os.mkfifo(file, 0o600),
    "is open to others": lambda file, _: (file.touch(), file.chmod(0o622)),
    "is in a directory of all": lambda file, _: file.parent.chmod(0o1777),
    "is behind a link": lambda file, other: (
        file.parent.rmdir(),
        (other.parent / "real").mkdir(0o700),
        file.parent.symlink_to(other.parent / "real"),
    ),
}


@pytest.mark.parametrize("how", OF_OTHERS)
def test_nothing_is_written_where_others_could_have_been(tmp_path: Path, how: str) -> None:
    other, directory = tmp_path / "other", tmp_path / "traces"
    other.touch(0o600)
    directory.mkdir(0o700)
    OF_OTHERS[how](directory / "traces.jsonl", other)
    with pytest.raises((OSError, ConfigError)):
        SampleFiles(directory, 1 << 20).append(LINE)
    with pytest.raises(ConfigError, match="--whiflash-trace-dir"):
        trace.check_directory(directory)
    assert other.read_bytes() == b""
    assert not any(path.stat().st_size for path in directory.iterdir())


def test_another_users_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SampleFiles(tmp_path, 1 << 20).append(LINE)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match=r"belongs to user .*, this process runs as user 12345"):
        SampleFiles(tmp_path, 1 << 20).append(LINE)
    assert lines(tmp_path) == [LINE]


class Disk(SampleFiles):
    """A disk that can be full, or hang until it is let go."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.full, self.goes_on = False, threading.Event()
        self.goes_on.set()

    def append(self, line: bytes) -> None:
        self.goes_on.wait()
        if self.full:
            raise OSError(28, "No space left on device")
        self.written.append(line)


def test_a_failure_is_said_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk()
    sampler = Sampler(disk)
    caplog.set_level(logging.INFO)
    disk.full = True
    for _ in range(3):
        sampler.take(lambda: {"a": 1})
    sampler.take(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    sampler.wait()
    assert (sampler.lost, len(caplog.records)) == (4, 1)
    assert "No space left" in caplog.text
    disk.full = False
    for _ in range(2):
        sampler.take(lambda: {"a": 1})
    sampler.wait()
    assert [json.loads(line) for line in disk.written] == [{"a": 1}] * 2
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_nobody_waits_for_a_disk_that_hangs() -> None:
    disk = Disk()
    disk.goes_on.clear()
    sampler = Sampler(disk)
    for _ in range(trace.WAITING + 10):
        sampler.take(dict)
    assert 9 <= sampler.lost <= 10, "one is in the thread's hands, or none yet"
    disk.goes_on.set()
    sampler.wait()
    assert len(disk.written) + sampler.lost == trace.WAITING + 10


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"trace_sample": 0.1}, "needs a place for the traces: give --whiflash-trace-dir"),
        ({"trace_dir": "x"}, "--whiflash-trace-dir has no effect without --whiflash-trace-sample"),
        ({"trace_text": "on"}, "--whiflash-trace-text has no effect without"),
        ({"trace_mib": 3}, "--whiflash-trace-mib has no effect without"),
    ],
)
def test_flags_that_do_nothing_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(Flags.model_validate(given), embedded_bundle())


@pytest.mark.parametrize("rate", ["1.1", "-0.1", "nan", "often"])
def test_a_rate_is_a_share(rate: str) -> None:
    with pytest.raises(ConfigError, match="--whiflash-trace-sample"):
        parse_flags({"trace_sample": rate})


def test_a_directory_that_cannot_be_written_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    flags = Flags(trace_sample=0.5, trace_dir=str(tmp_path / "file" / "traces"))
    with pytest.raises(ConfigError, match=r"--whiflash-trace-dir .* cannot be written \(Not a directory\)"):
        resolve(flags, embedded_bundle())


def test_settings_have_what_the_flags_say(tmp_path: Path) -> None:
    assert resolve(Flags(), embedded_bundle()).traces.rate == 0
    given = {"trace_sample": "0.25", "trace_dir": str(tmp_path / "t"), "trace_text": "on", "trace_mib": "8"}
    traces = resolve(parse_flags(given), embedded_bundle()).traces
    assert (traces.rate, traces.directory, traces.text, traces.mib) == (0.25, tmp_path / "t", True, 8)


def test_the_command_line_reads_what_was_sampled(tmp_path: Path) -> None:
    sample = {"time": 1700000000.5, "id": "abc", "model": "m", "sglext": {"whiflash": SUMS}}
    SampleFiles(tmp_path, 1 << 20).append(json.dumps(sample).encode() + b"\n")
    (turn,) = turns_of(tmp_path / "traces.jsonl")
    assert (turn.title, turn.model, turn.text) == ("2023-11-14 22:13:20 UTC, abc", "m", "")


def test_a_torn_last_line_takes_no_other_with_it(tmp_path: Path) -> None:
    """A server that ended while it wrote leaves one; a line in the middle that is no JSON is named."""
    line = json.dumps({"id": "abc", "sglext": {"whiflash": SUMS}}) + "\n"
    file = tmp_path / "traces.jsonl"
    file.write_text(line * 2 + line[:40])
    assert len(turns_of(file)) == 2
    file.write_text(line + line[:40] + "\n" + line)
    with pytest.raises(ConfigError, match=r"traces\.jsonl, line 2: not JSON"):
        turns_of(file)
    file.write_text(line[:40])
    with pytest.raises(ConfigError, match=r"traces\.jsonl, line 1: not JSON"):
        turns_of(file)


SUMS: dict[str, Any] = {"version": 1, "policy": "auto", "rounds": 1, "tokens": 2, "arms": {}}
STRETCH = {"start": 0, "end": 10**9, "arm": "ar", "rounds": 10**9, "accepted": 0}
ODD: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "another version": ({"version": 2}, {}, 1),
    "a wrong type": ({"rounds": [1]}, {}, 1),
    "a number of digits": ({"tokens": "9" * 3000}, {}, 1),
    "seconds of no request": ({"seconds": 1e300}, {}, 1),
    "sums that are too large together": ({"arms": {"ar": {"rounds": 1, "tokens": 1, "saved": 1e308}}}, {}, 1),
    "rounds that nobody lists": ({"stretches": [STRETCH]}, {}, 0),
    "no list of choices": ({}, {"choices": 5}, 1),
    "a time of no calendar": ({}, {"time": 1e300}, 0),
    "no text": ({}, {"choices": [{"message": {"tool_calls": [{"function": 3}]}}]}, 0),
    "a caller that is none": ({}, {"agent": ["a"]}, 1),
}
"""Fields of a trace and of its answer, and how many lines a report skips for it."""


@pytest.mark.parametrize("how", ODD)
def test_a_line_that_does_not_fit_is_skipped_and_counted(tmp_path: Path, how: str) -> None:
    """In a report; who looks at single answers is told which one it is."""
    trace, answer, skipped = ODD[how]
    good, odd = (
        json.dumps({"id": "x", **more, "sglext": {"whiflash": one}})
        for one, more in ((SUMS, {}), ({**SUMS, **trace}, answer))
    )
    file = tmp_path / "traces.jsonl"
    file.write_text(f"{good}\n{odd}\n{good}\n")
    found = by_caller(tmp_path)
    assert (len(found.skipped), found.shares["tenant"][0].answers) == (skipped, 3 - skipped)
    assert all(f"{file}, line 2: " in why for why in found.skipped)
    if how != "a caller that is none":
        with pytest.raises(ConfigError, match=f"{file}, response 2 "):
            turns_of(file)


def test_what_is_no_file_of_samples_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "traces.jsonl")
    (tmp_path / "traces.1.jsonl").write_bytes(b"\xff\n[]\n")
    (tmp_path / "traces.2.jsonl").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"has no sampled traces.*skipped .*traces\.1\.jsonl, line 1"):
        by_caller(tmp_path)
    for number in ("", ".1", ".2"):
        with pytest.raises(ConfigError, match="cannot be read"):
            turns_of(tmp_path / f"traces{number}.jsonl")

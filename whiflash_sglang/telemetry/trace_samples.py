"""Traces of a fraction of all requests, as JSON lines in files of bounded size. Imports no SGLang.

Whoever serves must not wait for a disk: lines are made and written by a thread of their own, and where it cannot keep
up or write, samples are lost, which is logged once, and nothing else happens.
"""

import errno
import fcntl
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from whiflash_sglang.errors import ConfigError

logger = logging.getLogger(__name__)

PARTS: Final = 4
"""Files: the newest is written, the oldest goes when it is full."""
CURRENT: Final = "traces.jsonl"
WAITING: Final = 256
"""Samples that wait to be written at most."""


class TraceSampling(BaseModel):
    """What is kept of whom.

    rate: share of requests. directory: where their traces go. text: whether with their text and stretches, else in
    sums. mib: MiB that all files together have at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    directory: Path | None = None
    text: bool = False
    mib: Annotated[int, Field(ge=1)] = 64


def check_directory(directory: Path) -> None:
    """Make it, for its owner alone, if it is not there. Raises ConfigError where nothing can be written in it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        SampleFiles(directory, 1 << 62).append(b"")  # turns nothing
    except OSError as error:
        raise ConfigError(f"--whiflash-trace-dir {directory}: {error.strerror}") from None


class SampleFiles:
    """`traces.jsonl`, and behind it `traces.1.jsonl` (newer) to `traces.3.jsonl` (older).

    Several processes may write into one directory. Only their owner may read the files.

    Args:
        most: bytes of all files together.
    """

    def __init__(self, directory: Path, most: int) -> None:
        self._directory, self._part = directory, most // PARTS

    def append(self, line: bytes) -> None:
        """Write `line`, all of it or nothing. Raises OSError."""
        if len(line) > self._part > 0:
            raise OSError(errno.EFBIG, f"a sample of {len(line)} bytes is longer than a file may be")
        with self._locked():
            handle = self._open()
            try:
                size = _mended(handle)
                if size and size + len(line) > self._part:
                    os.close(handle)
                    self._rotate()
                    handle = self._open()
                    size = 0
                try:
                    written = os.write(handle, line)
                except OSError:
                    os.ftruncate(handle, size)
                    raise
                if written < len(line):
                    os.ftruncate(handle, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(handle)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self._directory / CURRENT, flags, 0o600)

    def _rotate(self) -> None:
        stem, suffix = CURRENT.split(".")
        names = [CURRENT, *(f"{stem}.{number}.{suffix}" for number in range(1, PARTS))]
        for newer, older in reversed(list(pairwise(names))):
            if (self._directory / newer).exists():
                os.replace(self._directory / newer, self._directory / older)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(
            self._directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _mended(handle: int) -> int:
    """Size of the file after what a crash left of a last line is cut off."""
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        size = os.pread(handle, size, 0).rfind(b"\n") + 1
        os.ftruncate(handle, size)
    return size


class Sampler:
    """Writes samples behind the caller's back. `lost`: how many could not be written."""

    def __init__(self, files: SampleFiles) -> None:
        self.lost = 0
        self._files = files
        self._failing = False
        self._waiting: queue.Queue[Callable[[], Mapping[str, Any] | None]] = queue.Queue(WAITING)
        threading.Thread(target=self._run, name="whiflash-traces", daemon=True).start()

    def take(self, make: Callable[[], Mapping[str, Any] | None]) -> None:
        """Write what `make` returns, if anything; it is called in another thread. Never waits, never raises."""
        try:
            self._waiting.put_nowait(make)
        except queue.Full:
            self._lose("they come faster than they can be written")

    def wait(self) -> None:
        """Until everything taken so far is written or lost."""
        self._waiting.join()

    def _run(self) -> None:
        while True:
            make = self._waiting.get()
            try:
                sample = make()
                if sample is not None:
                    self._files.append(json.dumps(sample).encode() + b"\n")
                    self._recovered()
            except Exception as error:  # whatever it is, requests go on and so do later samples
                self._lose(str(error))
            finally:
                self._waiting.task_done()

    def _lose(self, why: str) -> None:
        self.lost += 1
        if not self._failing:
            self._failing = True
            logger.warning("traces are not sampled: %s (said once, until one is written again)", why)

    def _recovered(self) -> None:
        if self._failing:
            self._failing = False
            logger.info("traces are sampled again; %d were lost since the start", self.lost)

"""Finished requests' tokens on disk, for a learner: bounded in bytes and age, written by a thread of its own.

A file holds the requests of some seconds. Its first line is a header, every other line is a `Sample`; it is written
under another name and renamed, so that a reader sees whole files only. Features are not among it: the learner computes
them by a pass of the target, which takes a thousandth of their size on disk. Imports no SGLang and no torch.
"""

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

from whiflash_sglang.errors import ConfigError

logger = logging.getLogger(__name__)

FORMAT: Final = 1
SUFFIX: Final = ".jsonl"
BATCH: Final = 64
"""Requests of a file at most."""
SECONDS: Final = 10.0
"""Longest time that a finished request waits to be written."""
WAITING: Final = 1 << 20
"""Tokens of requests that wait to be written at most."""

Outcome = Literal["written", "declined", "dropped", "failed"]
"""Of a finished request: on disk; not offered, since it does not consent or its tokens cannot be learned from; more
came than could be written; the disk did not take it.
"""


class Spooling(BaseModel):
    """directory: of the samples; None: nothing is kept. mib: MiB of all files at most. hours: their longest age."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: Path | None = None
    mib: Annotated[int, Field(ge=1)] = 256
    hours: Annotated[int, Field(ge=1)] = 168


class Sample(NamedTuple):
    """A finished request's token ids. handles: names that it is forgotten by (`lookup.memory.handles_of`)."""

    prompt: list[int]
    answer: list[int]
    handles: list[int]


class SampleFile(NamedTuple):
    """A file of samples. written: seconds since the epoch."""

    path: Path
    written: float
    size: int


def samples_of(learning: Path) -> Path:
    """Where the samples are, of the directory that `--whiflash-learn` names."""
    return learning / "samples"


def check_spool(directory: Path) -> None:
    """Make it, for its owner alone, if it is not there. Raises ConfigError where nothing can be written in it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"--whiflash-learn: samples cannot be written to {directory}: {error.strerror}"
        ) from None


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Nobody else changes the directory's files meanwhile. Raises OSError."""
    handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def files_of(directory: Path) -> list[SampleFile]:
    """The files of samples, oldest first; none of a directory that is not there."""
    found = []
    for path in sorted(directory.glob(f"[0-9]*{SUFFIX}")):
        try:
            written = int(path.name.partition("-")[0]) / 1e9
            found.append(SampleFile(path, written, path.stat().st_size))
        except (ValueError, FileNotFoundError):  # not ours, or dropped meanwhile
            continue
    return found


def read_samples(path: Path, target: str) -> list[Sample]:
    """The samples of a file; none of a file that was dropped meanwhile, or is of another format or target."""
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        said = json.loads(header)
        if (said["format"], said["target"]) != (FORMAT, target):
            return []
        return [Sample(**json.loads(line)) for line in lines]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no samples ({type(error).__name__}): remove it; a server writes whole files only"
        ) from None


class Spool:
    """Takes finished requests, and writes them behind the caller's back.

    Args:
        settings: with a directory that was checked. target: name of the model whose tokens they are.
        now: seconds since the epoch.

    Attributes:
        counts: finished requests by outcome. failing: whether the last file could not be written. size: bytes on disk
            when a file was written last. forgets: how often something was to be forgotten.
    """

    def __init__(self, settings: Spooling, target: str, now: Callable[[], float] = time.time) -> None:
        if settings.directory is None:
            raise ValueError("a spool needs a directory")
        self.counts: dict[str, int] = dict.fromkeys(get_args(Outcome), 0)
        self.failing, self.size, self.forgets = False, 0, 0
        self._directory, self._settings, self._target, self._now = settings.directory, settings, target, now
        self._waiting: list[Sample] = []
        self._tokens = 0
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        threading.Thread(target=self._run, name="whiflash-samples", daemon=True).start()

    def offer(self, prompt: Sequence[int], answer: Sequence[int], handles: Iterable[int] = ()) -> None:
        """Write a finished request sooner or later, or drop it. Never waits, never raises."""
        size = len(prompt) + len(answer)
        with self._changed:
            if self._tokens + size > WAITING:
                self.counts["dropped"] += 1
                return
            self._waiting.append(Sample(list(prompt), list(answer), sorted(handles)))
            self._tokens += size
            self._changed.notify()

    def decline(self) -> None:
        """Count a finished request that is not to be kept."""
        self.counts["declined"] += 1

    def snapshot(self) -> dict[str, Any]:
        """For `GET /whiflash/state`."""
        return {**self.counts, "bytes": self.size, "failing": self.failing}

    def flush(self) -> None:
        """Write what waits, now."""
        with self._writing:
            self._write(self._take())

    def forget(self, handle: int | None) -> None:
        """Drop what `handle` names of what waits; None: all. What is on disk then is for `forget_samples`."""
        self.forgets += 1
        with self._writing:
            taken = self._take()
            kept = [sample for sample in taken if handle is not None and handle not in sample.handles]
            with self._changed:
                self._waiting[:0] = kept
                self._tokens += sum(len(sample.prompt) + len(sample.answer) for sample in kept)

    def _take(self) -> list[Sample]:
        with self._changed:
            taken, self._waiting, self._tokens = self._waiting, [], 0
        return taken

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                self._changed.wait_for(lambda: len(self._waiting) >= BATCH, SECONDS)
            self.flush()

    def _write(self, samples: Sequence[Sample]) -> None:
        if not samples:
            return
        try:
            with locked(self._directory):
                write_file(self._directory, self._target, samples, self._now())
                self.size = prune(self._directory, self._settings, self._now())
        except OSError as error:
            self.counts["failed"] += len(samples)
            if not self.failing:
                self.failing = True
                logger.warning(
                    "no samples are kept for learning: %s: %s (said once, until some are written again); make room, or "
                    "lower --whiflash-learn-mib",
                    self._directory,
                    error.strerror,
                )
            return
        self.counts["written"] += len(samples)
        if self.failing:
            self.failing = False
            logger.info("samples are kept for learning again")


def write_file(directory: Path, target: str, samples: Sequence[Sample], now: float) -> Path:
    """Write a file of samples, whole or not at all; the caller has `locked` the directory. Raises OSError."""
    path = directory / f"{int(now * 1e9):020d}-{os.getpid()}{SUFFIX}"
    _replace(path, target, samples)
    return path


def _replace(path: Path, target: str, samples: Sequence[Sample]) -> None:
    handles = sorted({handle for sample in samples for handle in sample.handles})
    header: dict[str, Any] = {"format": FORMAT, "target": target, "handles": handles}
    lines = [header, *(sample._asdict() for sample in samples)]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    staged = path.with_suffix(".part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(staged, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


def prune(directory: Path, settings: Spooling, now: float) -> int:
    """Drop what a killed writer left, files that are too old, and the oldest beyond the bytes: bytes that are left.

    The caller has `locked` the directory. Raises OSError.
    """
    for part in directory.glob("*.part"):
        part.unlink(missing_ok=True)
    files = files_of(directory)
    total = sum(file.size for file in files)
    for file in files:
        old = now - file.written > settings.hours * 3600
        if not old and total <= settings.mib << 20:
            break
        file.path.unlink(missing_ok=True)
        total -= file.size
    return total


def forget_samples(directory: Path, handle: int | None) -> None:
    """Drop every sample on disk that `handle` names, and files that cannot be read; None: all. Raises OSError."""
    with locked(directory):
        for file in files_of(directory):
            kept: list[Sample] = []
            if handle is not None:
                try:
                    header, *lines = file.path.read_text(encoding="utf-8").splitlines()
                    said = json.loads(header)
                    if handle not in said["handles"]:
                        continue
                    samples = [Sample(**json.loads(line)) for line in lines]
                    kept = [sample for sample in samples if handle not in sample.handles]
                except (ValueError, KeyError, TypeError):  # nobody knows whose it is
                    kept = []
            if kept:
                _replace(file.path, said["target"], kept)
            else:
                file.path.unlink(missing_ok=True)

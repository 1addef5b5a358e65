"""Samples: token ids of finished requests on disk, for a learner; bounded in bytes and age, written by a thread.

A file holds the requests of some seconds. Its first line is a header, every other line is a `Sample`; it is written
under another name and renamed, so that a reader sees whole files only. Directory and files are open to the server's
user only; others are refused. Samples hold no features: the learner computes them by a pass of the target, because
tokens take a thousandth of the features' bytes. Imports no SGLang and no torch.
"""

import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from whiflash_sglang.copying.tenants import HANDLES
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import check_own, locked, open_own
from whiflash_sglang.files.jsonl import drop_staged, staged

logger = logging.getLogger(__name__)

FORMAT: Final = 1
SUFFIX: Final = ".jsonl"
BATCH: Final = 64
"""Number of waiting requests at which a file is written before `SECONDS` have passed."""
SECONDS: Final = 10.0
"""Longest time in seconds that a finished request waits to be written."""
PRUNED: Final = 3600.0
"""Longest time in seconds between two removals of old files."""
WAITING: Final = 1 << 20
"""Most tokens of requests that wait to be written; further requests are dropped."""

_NAME: Final = re.compile(r"[0-9]{20}-[0-9]+\.jsonl", re.ASCII)
_HANDLES_KEY: Final = b'"handles":'

Outcome = Literal["written", "declined", "dropped", "failed"]
"""Outcome of a finished request. written: on disk. declined: not offered, since it does not consent or its tokens
cannot be learned from. dropped: too many tokens were waiting. failed: writing to the disk failed.
"""


class Spooling(BaseModel):
    """Spool settings. directory: of the samples; None: off. mib: most MiB of all files. hours: longest age of one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: Path | None = None
    mib: Annotated[int, Field(ge=1)] = 256
    hours: Annotated[int, Field(ge=1)] = 168


Token = Annotated[int, Field(ge=0, lt=2**31)]
Handle = Annotated[int, Field(ge=0, lt=HANDLES)]


class Sample(NamedTuple):
    """Token ids of a finished request, a line of a file. handles: numbers by which its tenant can have it deleted
    (`copying.tenants.handle_of`), the tenant's own first; the last field of the line.
    """

    prompt: list[Token]
    answer: list[Token]
    handles: list[Handle]

    @property
    def tokens(self) -> int:
        """Number of tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)


_SAMPLE, _HANDLES = TypeAdapter(Sample), TypeAdapter(list[Handle])


class _Header(BaseModel):
    """First line of a file. handles: of all its samples."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    target: str
    handles: list[Handle]


def samples_of(learning: Path) -> Path:
    """Return the directory of samples in `learning`, the directory that `--whiflash-learn` names."""
    return learning / "samples"


def check_spool(directory: Path) -> None:
    """Create the directory of samples, open to its owner only, unless it exists.

    Raises:
        ConfigError: the directory cannot be written to, or other users can access it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_own(directory)
        with locked(directory):
            pass
    except OSError as error:
        raise ConfigError(f"--whiflash-learn: samples cannot be written to {directory}: {error.strerror}") from None


def files_of(directory: Path) -> dict[Path, int]:
    """Return the bytes of each file of samples, oldest first, without links; empty if there is no such directory."""
    sizes = {}
    for path in sorted(directory.glob(f"[0-9]*{SUFFIX}")):
        with suppress(FileNotFoundError):  # dropped meanwhile
            status = path.lstat()
            if _NAME.fullmatch(path.name) and stat.S_ISREG(status.st_mode):
                sizes[path] = status.st_size
    return sizes


def written(path: Path) -> float:
    """Return when a file of samples was written, in seconds since the epoch, by its name."""
    return int(path.name.partition("-")[0]) / 1e9


def read_samples(path: Path, target: str) -> list[Sample]:
    """Read the samples of a file; empty if the file is gone by now, or has another format or target.

    Raises ConfigError: other users can access the file, or it holds something else.
    """
    try:
        with open_own(path) as file:
            header = _Header.model_validate_json(file.readline())
            if (header.format, header.target) != (FORMAT, target):
                return []
            lines = file.readlines()
        samples = [_SAMPLE.validate_json(line, strict=True) for line in lines]
        known = set(header.handles).issuperset
        if not all(line.lstrip()[:1] == b"{" and known(s.handles) for line, s in zip(lines, samples, strict=True)):
            raise ValueError("a line is a list, or a handle is not in the header")
        return samples
    except FileNotFoundError:
        return []
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"{path} holds no samples ({type(error).__name__}): remove it; a server writes whole files only"
        ) from None


class Spool:
    """Takes finished requests and writes them to files in a thread.

    Args:
        settings: their directory must have passed `check_spool`. target: name of the model whose token ids they are.

    Attributes:
        counts: finished requests by outcome. failing: whether the last file could not be written. size: bytes of all
            files after the last write.
    """

    def __init__(self, settings: Spooling, target: str) -> None:
        assert settings.directory is not None, "a spool needs a directory"
        self.counts: dict[str, int] = dict.fromkeys(get_args(Outcome), 0)
        self.failing, self.size = False, 0
        self._directory, self._settings, self._target = settings.directory, settings, target
        self._waiting: list[Sample] = []
        self._taken: list[Sample] = []
        """Samples about to be written; `forget` may still remove some until the writer has the directory's lock."""
        self._tokens = 0
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        threading.Thread(target=self._run, name="whiflash-samples", daemon=True).start()

    def offer(self, prompt: Sequence[int], answer: Sequence[int], handles: Iterable[int] = ()) -> None:
        """Queue a finished request for the writer, or drop it if too many tokens wait. Never waits, never raises."""
        sample = Sample(list(prompt), list(answer), list(handles))
        with self._changed:
            if self._tokens + sample.tokens > WAITING:
                self.counts["dropped"] += 1
                return
            self._waiting.append(sample)
            self._tokens += sample.tokens
            self._changed.notify()

    def snapshot(self) -> dict[str, Any]:
        """Return the counts by outcome, `bytes` and `failing` for `GET /whiflash/state`."""
        return {**self.counts, "bytes": self.size, "failing": self.failing}

    def flush(self) -> None:
        """Write all waiting samples now."""
        with self._writing:
            with self._changed:
                self._taken, self._waiting, self._tokens = self._waiting, [], 0
            self._write()

    def forget(self, handle: int | None) -> None:
        """Drop samples with `handle` that wait or are about to be written; None: all. Never waits for the disk.

        `forget_samples` drops samples on disk. Each sample is dropped by one of the two: either the writer has
        the directory's lock first, and `forget_samples` searches its file, or it takes its samples after this.
        """
        with self._changed:
            self._waiting, self._taken = (
                [sample for sample in samples if handle is not None and handle not in sample.handles]
                for samples in (self._waiting, self._taken)
            )
            self._tokens = sum(sample.tokens for sample in self._waiting)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting, PRUNED)  # old files go without new ones, too
                self._changed.wait_for(lambda: len(self._waiting) >= BATCH, SECONDS)
            self.flush()

    def _write(self) -> None:
        samples = self._taken
        try:
            with locked(self._directory):
                with self._changed:
                    samples, self._taken = self._taken, []
                try:
                    if samples:
                        write_file(self._directory, self._target, samples, time.time())  # noqa: TID251 (a date)
                finally:  # also on a full disk
                    self.size = prune(self._directory, self._settings, time.time())  # noqa: TID251 (a date)
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
        if samples and self.failing:
            self.failing = False
            logger.info("samples are kept for learning again")


def write_file(directory: Path, target: str, samples: Sequence[Sample], now: float) -> Path:
    """Write a file of samples, whole or not at all; the caller has `locked` the directory. Raises OSError."""
    path = directory / f"{int(now * 1e9):020d}-{os.getpid()}{SUFFIX}"
    handles = {handle for sample in samples for handle in sample.handles}
    _replace(path, _header(target, handles), [_json(sample._asdict()) for sample in samples])
    return path


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _header(target: str, handles: set[int]) -> bytes:
    return _json({"format": FORMAT, "target": target, "handles": sorted(handles)})


def _replace(path: Path, header: bytes, lines: Sequence[bytes]) -> None:
    with staged(path) as place:
        place.touch(0o600)
        place.write_bytes(header + b"".join(lines))


def prune(directory: Path, settings: Spooling, now: float) -> int:
    """Remove temporary files of killed writers, files past `hours`, and, above `mib`, first files dated in the future,
    then the oldest. Return the bytes of the remaining files.

    The caller has `locked` the directory. Raises OSError.
    """
    drop_staged(directory)
    sizes = files_of(directory)
    total = sum(sizes.values())
    for path in sorted(sizes, key=lambda path: written(path) <= now):
        if now - written(path) > settings.hours * 3600 or total > settings.mib << 20:
            path.unlink(missing_ok=True)
            total -= sizes[path]
    return total


def forget_samples(directory: Path, handle: int | None) -> None:
    """Drop every sample on disk with `handle`, and files that cannot be read or rewritten; None: drop all.

    It parses handles only and no tokens, so it blocks other threads only briefly. Raises OSError if a file stays.
    """
    with locked(directory):
        drop_staged(directory)
        for path in files_of(directory):
            kept = False
            with suppress(OSError):  # another user's file, or a full disk
                kept = handle is not None and _without(path, handle)
            if not kept:
                path.unlink(missing_ok=True)


def _without(path: Path, handle: int) -> bool:
    """Rewrite a file without the samples that have `handle`; return whether any sample is left."""
    try:
        with open_own(path) as file:
            header = _Header.model_validate_json(file.readline())
            if handle not in header.handles:
                return True
            named = [(line, _handles(line)) for line in file]
    except ValueError:  # ConfigError is one; its tenants are unknown
        return False
    kept = [(line, handles) for line, handles in named if handle not in handles]
    if kept:
        left = {one for _, handles in kept for one in handles}
        _replace(path, _header(header.target, left), [line for line, _ in kept])
    return bool(kept)


def _handles(line: bytes) -> list[int]:
    """Parse the handles at the end of a `Sample`'s line. Raises ValueError."""
    return _HANDLES.validate_json(line.rpartition(_HANDLES_KEY)[2].rstrip().removesuffix(b"}"), strict=True)

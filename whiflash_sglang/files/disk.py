"""Opening, reading and copying files that others may have made: each function checks the kind of file, its size and
its owner first. Imports no SGLang and no torch.
"""

import hashlib
import os
import shutil
import stat
from pathlib import Path
from typing import Any, BinaryIO, Final

from filelock import BaseFileLock, FileLock

from whiflash_sglang.errors import CheckpointError, ConfigError

MOST_BYTES: Final = 64 << 20
"""Bytes of the largest file that is read into memory as one value."""
MOST_SETTINGS: Final = 1 << 18
"""Bytes of the largest file of settings that a person wrote: flags, or a configuration."""
MOST_EXPANDED: Final = 1 << 20
"""Most values and characters of a YAML text, with aliases counted at each use: against texts that expand."""


def open_regular(path: Path, limit: int | None = None, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a regular file of at most `limit` bytes for reading; never waits for a pipe. Raises OSError, ValueError."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no regular file")
        if limit is not None and status.st_size > limit:
            raise ValueError(f"{status.st_size} bytes; at most {limit} are read")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, limit: int = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file, without a byte order mark and with "\\n" as the end of lines.

    Raises ConfigError: the file cannot be read, is not a regular file, no text, or longer than `limit` bytes.
    """
    try:
        with open_regular(path, limit) as file:
            return file.read(limit).decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        reason = error.strerror
    except ValueError as error:  # UnicodeDecodeError is one
        reason = str(error)
    raise ConfigError(f"{path} cannot be read: {reason}")


def read_yaml(path: Path) -> Any:
    """Load the only document of a YAML file of at most `MOST_SETTINGS` bytes. Raises ConfigError, naming the file."""
    try:
        documents = yaml_documents(read_text(path, MOST_SETTINGS))
    except ValueError as error:
        raise (error if isinstance(error, ConfigError) else ConfigError(f"{path} is not YAML: {error}")) from None
    if len(documents) > 1:
        raise ConfigError(f"{path} holds {len(documents)} documents: give one")
    return documents[0] if documents else None


def yaml_documents(text: str) -> list[Any]:
    """Load the documents of a YAML text. Raises ValueError: not YAML, contains itself, or above `MOST_EXPANDED`."""
    import yaml  # type: ignore[import-untyped]

    class Bounded(yaml.SafeLoader):  # type: ignore[misc]
        size = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            alias, before = self.check_event(yaml.AliasEvent), self.size
            node = super().compose_node(parent, index)
            own = 1 + len(node.value) if isinstance(node, yaml.ScalarNode) else 1
            self.size += getattr(node, "size", MOST_EXPANDED) if alias else own
            if self.size > MOST_EXPANDED:
                raise ValueError(f"it holds itself, or comes to more than {MOST_EXPANDED} values and characters")
            node.size = self.size - before
            return node

    try:
        return list(yaml.load_all(text, Bounded))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def check_own(path: Path) -> None:
    """Raise ConfigError if `path` is no directory, or is another user's or open to others; OSError if unreadable."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{path} is no directory but a link or a file: remove it, or use another directory")
    _check_owner(path, status, "700")


def open_own(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a file that only this process's user may access, for reading and with `flags`. Raises ConfigError if it is
    a link, has a second name (hard link), or others may access it; OSError.
    """
    try:
        file = open_regular(path, flags=flags | os.O_NOFOLLOW)
    except ValueError:
        raise ConfigError(f"{path} is no regular file: remove it") from None
    try:
        status = os.fstat(file.fileno())
        if status.st_nlink > 1:
            raise ConfigError(f"{path} is another file, too, by a hard link: remove it")
        _check_owner(path, status, "600")
    except BaseException:
        file.close()
        raise
    return file


def _check_owner(path: Path, status: os.stat_result, mode: str) -> None:
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} belongs to user {status.st_uid}, this process runs as user {os.geteuid()}: run it as that user, "
            "or use another directory"
        )
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{path} has mode {stat.S_IMODE(status.st_mode):o}, so that other users may read or write it: check what "
            f"it holds, then `chmod {mode}`"
        )


def locked(directory: Path, name: str = ".lock") -> BaseFileLock:
    """Return a context that holds the directory's lock against other processes. name: of its file. Raises OSError.
    A missing directory is made for its owner only: the lock would open it to others."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return FileLock(directory / name, mode=0o600)


def roots_of(directory: Path) -> tuple[Path, ...]:
    """Directories that links in a checkpoint or bundle may lead to: its own, and `blobs` if it is a hub snapshot."""
    whole = Path(os.path.realpath(directory))
    snapshot = next((folder for folder in (whole, *whole.parents) if folder.parent.name == "snapshots"), None)
    return (whole,) if snapshot is None else (whole, snapshot.parent.parent / "blobs")


def copy_member(file: Path, place: Path) -> Path:
    """Copy a checkpoint's file into the directory `place`, readable to no more users than the file; return the copy.

    Raises:
        ConfigError: the file is a link out of its directory, no regular file, or cannot be opened. CheckpointError: it
            is named `.safetensors` and does not hold tensors. OSError: it cannot be copied.
    """
    real = Path(os.path.realpath(file))
    if not any(real.is_relative_to(root) for root in roots_of(file.parent)):
        raise ConfigError(f"{file} is a link to {real}, outside its checkpoint: put a copy of the file there")
    try:
        source = open_regular(real, flags=os.O_RDONLY | os.O_NOFOLLOW)  # refuses a link made since `realpath`
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}; put a copy of the file there") from None
    with source:
        if file.suffix == ".safetensors":
            _check_tensors(file, source)
        mode = stat.S_IMODE(os.fstat(source.fileno()).st_mode) & 0o044 | 0o600
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(place / file.name, flags, mode), "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    return place / file.name


def _check_tensors(file: Path, source: BinaryIO) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(f"/proc/self/fd/{source.fileno()}", framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no safetensors file, or is damaged: {error}; fetch it again") from None

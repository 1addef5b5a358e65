"""Files that others may have made: opened, read and copied in one way, which looks at what they are before it believes
them. Imports no SGLang and no torch.
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
"""Bytes of the largest file that is read as one value."""
MOST_SETTINGS: Final = 1 << 18
"""The same of a file that a person wrote: flags, or a configuration."""
MOST_EXPANDED: Final = 1 << 20
"""Values and their characters in a YAML text, those of its aliases counted wherever they are used."""


def open_regular(path: Path, limit: int | None = None, flags: int = os.O_RDONLY) -> BinaryIO:
    """A regular file of at most `limit` bytes, to be read; a pipe is not waited for. Raises OSError, ValueError."""
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
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, limit: int = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file, without the mark that some editors put first.

    Raises ConfigError: it cannot be read, is no file, no text, or longer than `limit` bytes.
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
    """The one document of a YAML file of at most `MOST_SETTINGS`. Raises ConfigError, naming the file."""
    try:
        documents = yaml_documents(read_text(path, MOST_SETTINGS))
    except ValueError as error:
        raise (
            error if isinstance(error, ConfigError) else ConfigError(f"{path} is not YAML: {error}")
        ) from None
    if len(documents) > 1:
        raise ConfigError(f"{path} holds {len(documents)} documents: give one")
    return documents[0] if documents else None


def yaml_documents(text: str) -> list[Any]:
    """The documents of a YAML text. Raises ValueError: it is none, holds itself, or comes to too much."""
    import yaml  # type: ignore[import-untyped]

    class Bounded(yaml.SafeLoader):  # type: ignore[misc]
        size = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            alias, before = self.check_event(yaml.AliasEvent), self.size
            node = super().compose_node(parent, index)
            own = 1 + len(node.value) if isinstance(node, yaml.ScalarNode) else 1
            self.size += getattr(node, "size", MOST_EXPANDED) if alias else own
            if self.size > MOST_EXPANDED:
                raise ValueError(
                    f"it holds itself, or comes to more than {MOST_EXPANDED} values and characters"
                )
            node.size = self.size - before
            return node

    try:
        return list(yaml.load_all(text, Bounded))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def check_own(path: Path) -> None:
    """Raise ConfigError where a directory is a link, another user's, or open to others. OSError."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{path} is no directory but a link or a file: remove it, or use another directory")
    _check_owner(path, status, "700")


def open_own(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """A file that only this process's user may read and write, to be read and what `flags` say; no link, and no second
    name of another file. Raises ConfigError, OSError.
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
    """A context in which nobody else changes the directory's files. name: of the lock's file. Raises OSError."""
    return FileLock(directory / name, mode=0o600)


def roots_of(directory: Path) -> tuple[Path, ...]:
    """Directories that links in a checkpoint or a bundle may lead to: its own, and the `blobs` of a hub's snapshot."""
    whole = directory.resolve()
    snapshot = next((folder for folder in (whole, *whole.parents) if folder.parent.name == "snapshots"), None)
    return (whole,) if snapshot is None else (whole, snapshot.parent.parent / "blobs")


def copy_member(file: Path, place: Path) -> Path:
    """Copy a file of a checkpoint's directory into the directory `place`, open to no more users than it is: the copy.

    Raises:
        ConfigError: a link leads out of its directory, or it is no regular file. CheckpointError: by its name it holds
            tensors, and does not. OSError.
    """
    real = file.resolve()
    if not any(real.is_relative_to(root) for root in roots_of(file.parent)):
        raise ConfigError(f"{file} is a link to {real}, outside its checkpoint: put a copy of the file there")
    try:
        source = open_regular(real, flags=os.O_RDONLY | os.O_NOFOLLOW)  # no link since it was resolved
    except ValueError as error:
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
        raise CheckpointError(
            f"{file} is no safetensors file, or is damaged: {error}; fetch it again"
        ) from None

"""Compiles C++ sources for this machine's processor at their first use.

`available` decides on the fallback to torch, `checked` compares the compiled functions with torch.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from whiflash_kernels.processor import has_avx2, instructions

logger = logging.getLogger("whiflash_kernels")
K = TypeVar("K")

_PATIENCE = 120
"""Seconds after which a compiler run is stopped; one usually takes two."""

_DIGEST = hashlib.sha256().digest_size
_FLAGS = ("-O3", "-march=native", "-fPIC", "-std=c++17")

_TYPES: dict[str, Any] = {"v": None, "p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32}
_TYPES |= {"f": ctypes.c_float, "d": ctypes.c_double}
"""Types of results and arguments, by letter. A pointer may be an address, bytes or a function."""


class Native:
    """An object of the library, which is freed with this one. `whiflash_NAME` of the library is its method `NAME`."""

    def __init__(self, library: ctypes.CDLL, kind: str, *arguments: Any) -> None:
        self.library = library
        self._end = getattr(library, f"whiflash_{kind}_end")
        self.at = getattr(library, f"whiflash_{kind}")(*arguments)

    def __getattr__(self, name: str) -> Any:
        method = partial(getattr(self.library, f"whiflash_{name}"), self.at)
        setattr(self, name, method)
        return method

    def __del__(self) -> None:
        if "at" in self.__dict__:
            self._end(self.at)


def profiled(name: str) -> Any:
    """Return a context that torch's profiler records as the operator `whiflash::NAME`, like torch's own. Entering it
    takes half a microsecond."""
    return torch._C._profiler._RecordFunctionFast(f"whiflash::{name}")


def available(what: str, compiled: Callable[[Path], K], directory: Path) -> K | None:
    """Return ``compiled(directory)``, or None, with a log line, if it is unavailable: then torch or Python runs.

    The kernels' loops are written for AVX2 and AVX-512. ``WHIFLASH_KERNELS=torch`` selects torch.
    """
    if os.environ.get("WHIFLASH_KERNELS") == "torch":
        return None
    if not has_avx2():
        logger.info("%s without compiled kernels: this processor has no AVX2, which they are for", what)
        return None
    try:
        return compiled(directory)
    except OSError as error:
        logger.warning("compiled %s is unavailable, what is slower runs instead: %s", what, error)
        return None


def checked(library: ctypes.CDLL, kernel: K, agrees: Callable[[K], bool]) -> K:
    """Return ``kernel`` if its library may run in this process.

    Raises:
        OSError: the library does not share torch's threads, or computes something else than torch.
    """
    # Torch is asked first, because asking it sets the number of OpenMP threads of this Python thread.
    if torch.get_num_threads() != library.whiflash_threads():
        raise OSError("the compiled functions do not run on torch's threads")
    if not agrees(kernel):
        raise OSError("the compiled functions compute something else than torch on this processor")
    return kernel


def load(source: Path, directory: Path, flags: Sequence[str] = (), functions: str = "") -> ctypes.CDLL:
    """Load the library of one C++ source, and compile it into `directory` unless it is there already.

    The library's name depends on source, compiler, compiler version, flags and processor, so machines may share the
    directory. The library is written under another name and renamed, so processes may start together. It ends with a
    digest of itself, so a library that a failing machine left is compiled again. Compiling takes some seconds.

    A library is code, so nobody else may be able to put one there: see `_own_directory`.

    Args:
        flags: for compiling, after those for speed. None of them is for linking: linked with -ffast-math a library
            makes its process flush subnormal numbers, linked with -fopenmp it would bring a second OpenMP beside
            torch's, whose symbols every library of the process sees. functions: `NAME:LETTERS` for each function
            `whiflash_NAME`, with a letter of `_TYPES` for its result and for each argument.

    Raises:
        OSError: there is no compiler, it refuses the source or does not end in two minutes; the directory cannot be
            written, or another user owns it or may write to it; or the library does not fit the process.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler (c++, g++ or clang++) on the PATH")
    options = (*_FLAGS, *flags)
    try:
        version = _run([compiler, "--version"], check=False).stdout
        words = " ".join([compiler, *options, instructions()]).encode()
        files = (source, *sorted(source.parent.glob("*.h")))
        key = hashlib.sha256(b"".join(file.read_bytes() for file in files) + words + version).hexdigest()[:12]
        library = _own_directory(directory) / f"{source.stem.replace('_', '-')}-{key}.so"
        if _is_ours(library):
            try:
                return _typed(library, functions)
            except OSError:  # A system with a newer C++ library, which shares the directory, has compiled it.
                pass
        _build(compiler, options, source, library)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or b"").decode(errors="replace").strip().splitlines()[-1:]
        raise OSError(f"the C++ compiler refuses {source.name}: {''.join(last)}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"the C++ compiler did not end with {source.name} in {error.timeout:.0f} s") from error
    return _typed(library, functions)


def _typed(path: Path, functions: str) -> ctypes.CDLL:
    """Load a library, and set the types of its functions."""
    library = ctypes.CDLL(str(path))
    for name, letters in (each.split(":") for each in functions.split()):
        function = getattr(library, f"whiflash_{name}")
        function.restype, *function.argtypes = (_TYPES[letter] for letter in letters)
    return library


@cache
def _own_directory(directory: Path) -> Path:
    """Return a path to `directory` that stays valid if somebody renames it or a parent of it.

    It is this process's user's alone (0700), or OSError is raised. The path leads through an open file descriptor, so
    what was checked is what libraries are loaded from. The descriptor stays open: its number is part of the path, and
    the loader takes equal paths for one library.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    status = os.fstat(descriptor)
    if not _is_private(status):
        os.close(descriptor)
        raise OSError(
            f"{directory} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}: another user "
            "could put a library there; remove it, or make it yours alone (chmod 700)"
        )
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")


def _is_private(status: os.stat_result) -> bool:
    """Whether this process's user owns a file and nobody else may write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_ours(library: Path) -> bool:
    """Whether the file is this user's and ends with the digest of the rest: loading half a library would crash."""
    if not library.exists() or not _is_private(library.lstat()):
        return False
    content = library.read_bytes()
    return content[-_DIGEST:] == hashlib.sha256(content[:-_DIGEST]).digest()


def _run(command: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, check=check, capture_output=True, timeout=_PATIENCE)


def _build(compiler: str, options: Sequence[str], source: Path, library: Path) -> None:
    with TemporaryDirectory(dir=library.parent) as staged:
        parts, whole = Path(staged) / "parts.o", Path(staged) / "whole.so"
        for command in (
            [compiler, *options, "-c", str(source), "-o", str(parts)],
            [compiler, "-shared", str(parts), "-o", str(whole)],
        ):
            _run(command)
        content = whole.read_bytes()
        whole.write_bytes(content + hashlib.sha256(content).digest())
        whole.chmod(0o700)
        os.replace(whole, library)

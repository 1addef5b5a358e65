"""C++ sources, compiled for this machine's processor the first time that they are wanted."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

_PATIENCE = 120
"""Seconds after which a compiler is given up. It takes two."""

_DIGEST = hashlib.sha256().digest_size
_FLAGS = ("-O3", "-march=native", "-fPIC", "-std=c++17")


def load(source: Path, directory: Path, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of one C++ source and the headers beside it, compiled into `directory` unless it lies there already.

    A library's name tells its source, compiler, flags and processor apart, so that machines may share the directory. It
    is written beside and renamed, so that processes may start together, and ends with a digest of itself, so that what
    a failing machine left is made anew. Compiling takes some seconds.

    Args:
        flags: for compiling, behind those for speed. None of them is for linking: linked with -ffast-math a library
            makes its process flush subnormal numbers, linked with -fopenmp it would bring a second OpenMP beside
            torch's, whose symbols every library of the process sees.

    Raises:
        OSError: there is no compiler, it refuses the source or does not end in two minutes, the directory cannot be
            written, or the library does not fit the process.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler (c++, g++ or clang++) on the PATH")
    options = (*_FLAGS, *flags)
    words = " ".join([compiler, *options, _processor()])
    files = (source, *sorted(source.parent.glob("*.h")))
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files) + words.encode()).hexdigest()[:12]
    library = directory / f"{source.stem.replace('_', '-')}-{key}.so"
    if _is_whole(library):
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # Another system's, which shares the directory and has a newer C++ library.
            pass
    directory.mkdir(parents=True, exist_ok=True)
    try:
        _build(compiler, options, source, library)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or b"").decode(errors="replace").strip().splitlines()[-1:]
        raise OSError(f"the C++ compiler refuses {source.name}: {''.join(last)}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"the C++ compiler did not end with {source.name} in {error.timeout:.0f} s") from error
    return ctypes.CDLL(str(library))


def _is_whole(library: Path) -> bool:
    """Whether the file ends with the digest of the rest. Loading half a library would end the process."""
    content = library.read_bytes() if library.exists() else b""
    return content[-_DIGEST:] == hashlib.sha256(content[:-_DIGEST]).digest()


def _build(compiler: str, options: Sequence[str], source: Path, library: Path) -> None:
    with TemporaryDirectory(dir=library.parent) as staged:
        parts, whole = Path(staged) / "parts.o", Path(staged) / "whole.so"
        for command in (
            [compiler, *options, "-c", str(source), "-o", str(parts)],
            [compiler, "-shared", str(parts), "-o", str(whole)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE)
        content = whole.read_bytes()
        whole.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(whole, library)


def _processor() -> str:
    """What tells this processor's instructions from another's that shares the directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("flags", "Features", "CPU part")  # x86's, and Arm's
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(names)}))

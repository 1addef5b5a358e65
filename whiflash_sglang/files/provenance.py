"""Record a result's origin: command, revision, versions, hardware, and load of the machine."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from whiflash_sglang.files.disk import sha256

_MEASURED = ("whiflash-sglang", "whiflash-kernels", "sglang", "torch", "transformers", "triton", "openai")

_SECRET = re.compile(
    r"""((?:api[-_]key|password)[=\s\0]+)(?:(?<=\0)[^\0]+|'[^']{,512}'|"[^"]{,512}"|[^\s\0]+)|(://)[^\s\0/@]*(?=@)"""
)
"""Matches a key or password after its flag or in a URL, in words separated by NUL; a word may contain flags."""


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return the words of a command with its keys and passwords replaced by asterisks."""
    return _SECRET.sub(r"\1\2***", "\0".join(words)).split("\0") if words else []


def made_by(packages: Sequence[str]) -> dict[str, Any]:
    """Return command, revision, versions and hardware of this process, without local directories or secrets."""
    program, *arguments = without_secrets(sys.argv)
    return {
        "command": [Path(program).name, *(Path(one).name if one.startswith("/") else one for one in arguments)],
        **checkout(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "hardware": {
            "machine": platform.machine(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        },
    }


def threads() -> int:
    """Return the number of compute threads of each measured server: the user's OMP_NUM_THREADS, else all cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def environment(bundle: Path) -> dict[str, Any]:
    """Return what every measurement records: `made_by`, the number of threads, the digests of the bundle's weights."""
    return {**made_by(_MEASURED), "threads": threads(), "bundle_sha256": weights_of(bundle)}


def weights_of(bundle: Path) -> dict[str, str]:
    """Return the SHA-256 of each .safetensors file of a bundle, by relative path."""
    return {str(path.relative_to(bundle)): sha256(path) for path in sorted(bundle.rglob("*.safetensors"))}


def checkout(directory: Path) -> dict[str, Any]:
    """Return the Git revision of the checkout that tracks `directory`, and whether it has uncommitted changes."""
    tracked = _git("ls-files", here=directory)  # an environment inside another project's checkout is not tracked
    return {
        "revision": tracked and _git("rev-parse", "HEAD", here=directory),
        "uncommitted_changes": bool(tracked and _git("status", "--porcelain", "--untracked-files=no", here=directory)),
    }


def busy() -> dict[str, float]:
    """Measure the machine's load: load averages of 1 and 5 minutes, free memory in GiB."""
    minute, five, _ = os.getloadavg()
    return {
        "load_1min": minute,
        "load_5min": five,
        "free_memory_gb": round(psutil.virtual_memory().available / 2**30, 1),
    }


def _git(*arguments: str, here: Path) -> str:
    with suppress(OSError):  # Git is not installed
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True).stdout.strip()
    return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")

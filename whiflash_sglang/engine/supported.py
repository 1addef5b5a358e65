"""The releases of SGLang that WHIFLASH works with, and which of them is installed. Imports nothing of SGLang."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

SUPPORTED: tuple[str, ...] = ("0.5.22", "0.5.23")
"""Oldest first. The tests run with the last; `make canary VERSION=0.5.22` runs fewer tests with another."""
UNTESTED = "WHIFLASH_UNTESTED_SGLANG"
"""Environment variable that lets another release serve if it is 1. `--whiflash-untested-sglang on` sets it."""


@cache
def installed() -> str | None:
    """Return the number of the installed SGLang release; None without SGLang."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def has(since: str) -> bool:
    """Whether SGLang has what came with the supported release `since`. An unsupported release counts as newer."""
    return (found := installed()) not in SUPPORTED or SUPPORTED.index(found) >= SUPPORTED.index(since)

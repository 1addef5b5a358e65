"""The releases of SGLang that this one works with, and which of them is installed. Imports nothing of SGLang."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

SUPPORTED: tuple[str, ...] = ("0.5.22", "0.5.23")
"""Oldest first. The suite runs with the last; `make canary VERSION=0.5.22` runs the short one with another."""
UNTESTED = "WHIFLASH_UNTESTED_SGLANG"
"""Variable; with 1 another release may serve, too. `--whiflash-untested-sglang on` sets it."""


@cache
def installed() -> str | None:
    """The release's number, None without SGLang."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def has(since: str) -> bool:
    """Whether SGLang has what came with the supported release `since`. A release that is not ours counts as newer."""
    return (found := installed()) not in SUPPORTED or SUPPORTED.index(found) >= SUPPORTED.index(since)

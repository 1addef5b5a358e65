"""The releases of SGLang that WHIFLASH works with, and the installed release. Imports nothing of SGLang."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

SUPPORTED: tuple[str, ...] = ("0.5.23",)
"""Oldest first. The tests run with the last; `make canary VERSION=0.5.24` runs them with another."""
UNTESTED = "WHIFLASH_UNTESTED_SGLANG"
"""Environment variable that lets another release serve if it is 1. `--whiflash-untested-sglang on` sets it."""


@cache
def installed() -> str | None:
    """Return the number of the installed SGLang release; None without SGLang."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None

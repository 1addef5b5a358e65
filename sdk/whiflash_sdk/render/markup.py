"""How text that is not ours gets into HTML: as text."""

from __future__ import annotations

from html import escape

from whiflash_sdk.render.aligned import KNOWN_ARMS, printable


def safe(text: str) -> str:
    """Text as HTML, fit for an attribute too."""
    return escape(printable(text))


def class_of(arm: str) -> str:
    """The class that has a drafter's colours."""
    return f"arm-{arm}" if arm in KNOWN_ARMS else "arm-other"

"""All errors, as one tree.

WhiFlashError
├── HintError               a hint that the server would refuse; nothing was sent
├── UnsupportedServerError  `strict=True`, and the server does not route (plain SGLang, vLLM, OpenAI)
└── TraceError              the response carries a trace that cannot be read

Errors of the OpenAI client pass through as they are. A request that is refused for its hints is repeated without
them; under `strict=True` it is the client's `openai.BadRequestError`, whose message names the field.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Final

_SKIPPED: Final = frozenset(["whiflash_sdk", "openai", "anthropic", "httpx", "httpx2"])
"""Packages between a user's call and a warning about it."""


class WhiFlashError(Exception):
    """Base of everything this package raises itself."""


class HintError(WhiFlashError, ValueError):
    """A hint that the server would refuse. The message names the field and says what to change."""


class UnsupportedServerError(WhiFlashError):
    """`strict=True` was asked for and the server at this base URL does not understand hints."""


class TraceError(WhiFlashError, ValueError):
    """The response carries a trace that does not follow the documented schema."""


class UnsupportedServerWarning(UserWarning):
    """Once per base URL and reason: requests go out without hints, which the server does not read or has refused."""


def warn_unsupported(message: str) -> None:
    """Warn with `UnsupportedServerWarning` at the line that called the client."""
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _SKIPPED:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UnsupportedServerWarning, stacklevel=level)

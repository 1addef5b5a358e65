"""Errors and warnings of the SDK; all errors derive from `WhiFlashError`.

Errors of the OpenAI client pass through as they are. A request that is refused for its hints is repeated without
them; under `strict=True` it is the client's `openai.BadRequestError`, whose message names the field.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Final, TypeVar

_SKIPPED: Final = frozenset(["whiflash_sdk", "openai", "anthropic", "httpx", "httpx2"])
"""Packages between a user's call and a warning about it."""


class WhiFlashError(Exception):
    """Base of everything this package raises itself."""


class HintError(WhiFlashError, ValueError):
    """A hint that the server would refuse. The message names the field and says what to change."""


class UnsupportedServerError(WhiFlashError):
    """Under `strict=True`: the server at this base URL does not understand hints."""


class TraceError(WhiFlashError, ValueError):
    """The response carries a trace that does not follow the documented schema."""


class UnsupportedServerWarning(UserWarning):
    """Warning, once per base URL and reason, that requests are sent without hints, which the server does not accept."""


def warn_unsupported(message: str, category: type[Warning] = UnsupportedServerWarning) -> None:
    """Warn with the location of the user's line that called the client."""
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _SKIPPED:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


ResultT = TypeVar("ResultT")
_failed: list[str] = []


def guessed(guess: Callable[..., ResultT], *args: object, otherwise: ResultT) -> ResultT:
    """Return `guess(*args)`; if it raises, `otherwise`, so that no request fails. Warns at the first failure only.

    The warning has the error's type and place only, since its message may quote text of others.
    """
    try:
        return guess(*args)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"a guess about a request failed: {type(error).__name__} in line {at.lineno} of {at.filename}"
        if not _failed:
            _failed.append(fault)
            with contextlib.suppress(RuntimeWarning):  # raised if warnings are errors
                warn_unsupported(f"{fault}. Requests go out without it. Please report this", RuntimeWarning)
        return otherwise

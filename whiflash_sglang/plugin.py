"""Entry point of the group `sglang.srt.plugins`.

SGLang logs a failing plugin and starts without it, so nothing here may depend on being heard: on an engine that
does not fit, nothing is installed, and a command line that asks for WHIFLASH is stopped on the spot.
"""

import logging
import sys

logger = logging.getLogger(__name__)

_registered = False


def register() -> None:
    """Register the algorithm, the flags and the hooks. Idempotent.

    Raises:
        SystemExit: WHIFLASH is asked for on an engine it does not fit. (Upstream swallows every `Exception`.)
    """
    global _registered
    if _registered:
        return
    from whiflash_sglang.compat import patching
    from whiflash_sglang.errors import IncompatibleEngineError

    try:
        patching.require_names()
    except IncompatibleEngineError as error:
        if any(argument.upper().endswith("WHIFLASH") for argument in sys.argv):
            raise SystemExit(f"whiflash: error: {error}") from None
        logger.warning("WHIFLASH is not available: %s", error)
        return
    from whiflash_sglang.compat import (
        algorithm,
        control,
        flags,
        memory,
        radix,
        release,
        step,
        streamer,
        whitespace,
    )

    algorithm.register()
    flags.install()
    memory.install()
    radix.install()
    release.install()
    step.install()
    streamer.install()
    control.install()
    whitespace.install()
    _registered = True

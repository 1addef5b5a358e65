"""The entry point of the group `sglang.srt.plugins`, through which SGLang finds this package.

SGLang calls it in every process of every server, whatever algorithm that uses. So it only adds names: the algorithm to
SGLang's registry and the flags to its command line. Functions of SGLang are replaced only if the arguments ask for
WHIFLASH (:mod:`whiflash_sglang.http.command_line`, `algorithm.patch_scheduler`).

SGLang logs a failing plugin and starts without it. So with another version of SGLang nothing is registered, and a
command line that asks for WHIFLASH ends at once, unless it has `--whiflash-untested-sglang on`.
"""

import logging
import os
import sys
from itertools import pairwise

logger = logging.getLogger(__name__)
UNTESTED_FLAG = "--whiflash-untested-sglang"

_registered = False


def register() -> None:
    """Register the algorithm and the flags, once.

    Raises:
        SystemExit: WHIFLASH is asked for on an SGLang that it does not fit. (SGLang swallows every `Exception`.)
    """
    global _registered
    if _registered:
        return
    from whiflash_sglang.engine import patching, supported
    from whiflash_sglang.errors import IncompatibleEngineError

    if (UNTESTED_FLAG, "on") in pairwise(sys.argv) or f"{UNTESTED_FLAG}=on" in sys.argv:
        os.environ[supported.UNTESTED] = "1"  # processes of a server inherit it
    try:
        patching.require_version()
    except IncompatibleEngineError as error:
        if any(argument.upper().endswith("WHIFLASH") for argument in sys.argv):
            raise SystemExit(f"whiflash: error: {error}") from None
        logger.warning("WHIFLASH is not available: %s", error)
        return
    from whiflash_sglang.engine import algorithm
    from whiflash_sglang.http import command_line

    algorithm.register(_worker)
    command_line.offer()
    _registered = True


def _worker() -> type:
    from whiflash_sglang.serve.worker import WhiFlashWorker

    return WhiFlashWorker

"""The entry point of the group `sglang.srt.plugins`, through which SGLang finds this package.

SGLang calls it in every process of every server, whatever algorithm that uses. So it only adds names: the algorithm to
SGLang's registry and the flags to its command line. Functions of SGLang are replaced only if the arguments ask for
WHIFLASH (:mod:`whiflash_sglang.http.command_line`, `algorithm.patch_scheduler`).

SGLang logs a failing plugin and starts without it. So with another version of SGLang nothing is registered, and a
command line that asks for WHIFLASH ends at once, unless it has `--whiflash-untested-sglang on`.
"""

import logging
import multiprocessing
import os
import sys
from itertools import pairwise
from pathlib import Path

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
    _check_command_line()
    from whiflash_sglang.engine import algorithm
    from whiflash_sglang.http import command_line

    algorithm.register(_worker)
    command_line.offer()
    _registered = True


def _check_command_line() -> None:
    """Check a command line that names WHIFLASH before SGLang reads it. Raises SystemExit if it cannot work.

    Only commands that start a server are checked, not SGLang's other commands and not the processes of a server.
    """
    launcher, *arguments = sys.argv
    if multiprocessing.parent_process():
        return
    if Path(launcher).name == "sglang" and arguments[:1] == ["serve"]:
        arguments = arguments[1:]
    elif Path(launcher).name != "launch_server.py":
        return
    from whiflash_sglang.engine.launch import early
    from whiflash_sglang.errors import WhiflashError

    try:
        if early.named(arguments):
            early.check(arguments)
    except WhiflashError as error:
        raise SystemExit(f"whiflash: error: {error}") from None


def _worker() -> type:
    from whiflash_sglang.serve.worker import WhiFlashWorker

    return WhiFlashWorker

"""Install the patches of a process as soon as its arguments ask for WHIFLASH, and not before.

The launcher knows it after reading the command line, `Engine` after reading its keywords, and the scheduler when SGLang
asks the registered algorithm for its worker: before pools, caches, grammars and the output streamer exist. No other
process of a server is changed, and a server without WHIFLASH does not even import the patches. They stay for the life
of a process, so each checks whether the server that it is called for is ours.
"""

import logging
import os
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import walk_packages
from typing import Any

from whiflash_sglang import engine
from whiflash_sglang.engine import patches, patching
from whiflash_sglang.engine.carried import APP_PATH, WORKER_APP
from whiflash_sglang.engine.supported import SUPPORTED, installed

logger = logging.getLogger(__name__)


def in_launcher(server_args: Any) -> None:
    """Install validation, traces, routes and the redaction of keys in the process that serves HTTP. Idempotent.
    Several tokenizer workers serve HTTP from processes that SGLang starts with our module (`http_worker`).
    """
    from whiflash_sglang.engine.http import routes
    from whiflash_sglang.engine.launch import arguments, keys

    patching.install(arguments, keys)
    routes.install()
    if server_args.tokenizer_worker_num > 1:
        os.environ.setdefault(APP_PATH, WORKER_APP)


def in_engine() -> None:
    """Install checks of requests, figures and traces in the process that holds an `Engine`. Idempotent."""
    from whiflash_sglang.engine.http import admission, recordings
    from whiflash_sglang.engine.launch import arguments
    from whiflash_sglang.engine.scheduler import figures

    patching.install(arguments, admission, figures, recordings)


def in_scheduler() -> None:
    """Install the patches that the worker needs in its scheduler's process. Idempotent.

    Raises:
        IncompatibleEngineError: a private name is missing or has changed.
    """
    patching.require_names()
    from whiflash_sglang.engine.forward import flash_backend, lora, target, triton_backend
    from whiflash_sglang.engine.scheduler import (
        disaggregation,
        hicache,
        kv_budget,
        radix,
        releases,
        scores,
        stops,
        subclass,
    )

    patching.install(
        disaggregation, hicache, lora, kv_budget, radix, releases, scores, stops, subclass, target
    )
    triton_backend.install()
    flash_backend.install()


def require_names() -> None:
    """Check SGLang's names at a launch. A release that was not tested must have all names that any process uses.

    Raises:
        IncompatibleEngineError: a private name is missing or has changed.
    """
    if installed() in SUPPORTED:
        patching.require_names()
        return
    for finding in (*missing(), *patching.verify_names()):
        patching.require(finding)
    logger.warning(
        "WHIFLASH was not tested with SGLang %s, which has all names that it uses: compare answers with plain "
        "decoding's before others use them (whiflash check --echo)",
        installed(),
    )


def missing() -> list[patching.Finding]:
    """Import all modules of this package, and those that other distributions name (`patches.BESIDE`), so that the table
    has all their patches. Returns a finding for each module that cannot be imported."""
    found = []
    ours = [module.name for module in walk_packages(engine.__path__, f"{engine.__name__}.")]
    for name in (*ours, *(one.value for one in entry_points(group=patches.BESIDE))):
        if name.endswith(".http_worker"):  # its import reads a launcher's shared memory
            continue
        try:
            import_module(name)
        except Exception as error:  # an import may fail in any way; all of them mean "does not fit"
            found.append(patching.Finding(name, False, f"does not import ({error})"))
    return found

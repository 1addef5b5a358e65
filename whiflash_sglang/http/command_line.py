"""Add our flags to SGLang's own command lines and to `Engine(...)`, and patch the process that reads them for WHIFLASH.

The settings are kept in `server_args._whiflash`: SGLang pickles underscore attributes to its child processes.
"""

import argparse
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from whiflash_sglang.checkpoints import hub
from whiflash_sglang.drafts import arms
from whiflash_sglang.engine import patches, patching
from whiflash_sglang.engine.carried import ALGORITHM, APP_PATH, WORKER_APP
from whiflash_sglang.engine.patching import around
from whiflash_sglang.engine.supported import SUPPORTED, installed
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.settings.config import Flags, flag_of, parse_flags, resolve
from whiflash_sglang.settings.flags import flags

logger = logging.getLogger(__name__)


def offer() -> None:
    """Install the patches that add our flags to every launcher. Idempotent.

    SGLang has to know the flags before it reads whether a launch asks for WHIFLASH; otherwise they change nothing.
    """
    patching.install(sys.modules[__name__])


def _dest(field: str) -> str:
    return flag_of(field)[2:].replace("-", "_")


@around(
    "sglang.srt.server_args:ServerArgs.add_cli_args",
    params=("parser",),
    why="plugins cannot add flags",
    until="SGLang asks an algorithm for its flags",
)
def _add_flags(original: Any, parser: argparse.ArgumentParser) -> None:
    """Add our flags to SGLang's command lines."""
    original(parser)
    group = parser.add_argument_group(
        "WhiFlash", "with --speculative-algorithm WHIFLASH; --speculative-draft-model-path takes a bundle, or nothing"
    )
    for name, takes, meaning in flags():
        group.add_argument(name, default=None, metavar=takes, help=meaning)


@around(
    "sglang.srt.server_args:ServerArgs.from_cli_args",
    params=("args",),
    why="plugins cannot add flags",
    until="SGLang asks an algorithm for its flags",
)
def _read_flags(original: Any, cls: Any, args: argparse.Namespace) -> Any:
    """Read our flags if `--speculative-algorithm` is WHIFLASH."""
    server_args = original(cls, args)
    try:
        if attach(server_args, {field: getattr(args, _dest(field), None) for field in Flags.model_fields}):
            server_args._whiflash_from_command_line = True
            patch_launcher(server_args)
    except WhiflashError as error:
        raise SystemExit(f"whiflash: error: {error}") from None
    return server_args


@around(
    "sglang.srt.entrypoints.engine:Engine.server_args_class",
    why="plugins cannot add keywords",
    until="SGLang asks an algorithm for its flags",
    makes=True,
)
def _engine_arguments(original: Any) -> Any:
    """Let `Engine` take our flags as keywords."""

    def build(**kwargs: Any) -> Any:
        given = {field: kwargs.pop(_dest(field), None) for field in Flags.model_fields}
        server_args = original(**kwargs)
        if attach(server_args, given):
            _patch_engine()
        return server_args

    return staticmethod(build)


def patch_launcher(server_args: Any) -> None:
    """Install validation, traces, routes and the redaction of keys in the process that serves HTTP. Idempotent.
    Several tokenizer workers serve HTTP from processes that SGLang starts with our module (`tokenizer_worker`).
    """
    from whiflash_sglang.engine.launch import arguments, keys
    from whiflash_sglang.http import routes

    patching.install(arguments, keys)
    routes.install()
    if server_args.tokenizer_worker_num > 1:
        os.environ.setdefault(APP_PATH, WORKER_APP)


def _patch_engine() -> None:
    """Install checks of requests, figures and traces in the process that holds an `Engine`. Idempotent."""
    from whiflash_sglang.engine.launch import arguments
    from whiflash_sglang.engine.scheduler import figures
    from whiflash_sglang.http import admission, traces

    patching.install(arguments, admission, figures, traces)


def require_names() -> None:
    """Check SGLang's names at a launch. A release that was not tested must have all names that any process uses.

    Raises:
        IncompatibleEngineError: a private name is missing or has changed.
    """
    if installed() in SUPPORTED:
        patching.require_names()
        return
    for finding in (*patches.missing(), *patching.verify_names()):
        patching.require(finding)
    logger.warning(
        "WHIFLASH was not tested with SGLang %s, which has all names that it uses: compare answers with plain "
        "decoding's before others use them (whiflash check --echo)",
        installed(),
    )


def attach(server_args: Any, given: dict[str, Any]) -> bool:
    """Resolve the flags and set them on `server_args`, before SGLang's own resolution reads the draft path.

    Returns:
        Whether the launch asks for WHIFLASH.

    Raises:
        ConfigError: naming the flag or the file.
        IncompatibleEngineError: a private name of SGLang is missing or has changed.
    """
    if (server_args.speculative_algorithm or "").upper() != ALGORITHM:
        if useless := [flag_of(field) for field, value in given.items() if value is not None]:
            why = "has no effect without --speculative-algorithm WHIFLASH: give both, or remove it"
            raise ConfigError(f"{useless[0]} {why}")
        return False
    require_names()
    from whiflash_sglang.checkpoints.fit import target_mtp
    from whiflash_sglang.engine.launch.arguments import choose

    flags, download_dir = parse_flags(given), server_args.download_dir
    if server_args.model_path.startswith(("/", ".", "~")):  # SGLang would take it for a malformed hub id
        hub.check_place(server_args.model_path)
    path, fetch = server_args.speculative_draft_model_path, partial(hub.fetch, download_dir=download_dir)
    revision = server_args.speculative_draft_model_revision
    local = fetch(path, revision=revision) if path else hub.default_bundle_for(server_args.model_path)
    places = {field: getattr(flags, field) for field in ("eagle_draft", "uno", "neural_router_path")}
    fetched = {field: str(fetch(place)) for field, place in places.items() if place and not Path(place).is_file()}
    flags = flags.model_copy(update=fetched)
    head = partial(target_mtp, server_args.model_path, server_args.revision, download_dir)
    settings = resolve(flags, local, download_dir, head)
    server_args._whiflash = settings
    choose(server_args)
    # SGLang reads the draft path as a checkpoint before any validator of ours runs.
    draft = settings.drafters.get(arms.DIFFUSION) or settings.drafters.get(arms.AR)
    server_args.speculative_draft_model_path = None if draft is None else str(draft)
    # A server without a tokenizer serves no chats, and SGLang has nothing to put a template into.
    if server_args.chat_template is None and settings.chat_template is not None:
        server_args.chat_template = None if server_args.skip_tokenizer_init else str(settings.chat_template)
    if server_args.tool_call_parser is None:
        server_args.tool_call_parser = settings.tool_call_parser
    return True

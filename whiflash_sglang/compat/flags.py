"""Our flags on SGLang's own command lines and on `Engine(...)`.

The values ride on `server_args._whiflash`: SGLang pickles underscore attributes to its child processes.
"""

import argparse
from functools import wraps
from pathlib import Path
from typing import Any

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import ServerArgs

from whiflash_sglang import hub
from whiflash_sglang.compat.carried import ALGORITHM
from whiflash_sglang.compat.patching import replace
from whiflash_sglang.config import Flags, flag_of, parse_flags, resolve
from whiflash_sglang.errors import WhiflashError

_HELP = {
    "eagle_draft": "EAGLE-3 checkpoint (directory or hub id). Needed unless the draft path is a bundle.",
    "drafters": "Drafter pair: df-e3 (DFlash and EAGLE-3). ddt-e3 (tree) is reserved.",
    "router": "How rounds are routed: auto (expected tokens per second of the batch), entropy or neural (the "
    "paper's, per request), or one arm pinned: ar, diffusion, lookup, none. copy-rule (copy where possible, "
    "else EAGLE-3) is a baseline, random exists for tests.",
    "neural_router_path": "Neural router: hub id, directory or .safetensors file.",
    "neural_router_threshold": "Threshold on the neural router's output (tokens of acceptance length).",
    "neural_router_sign": "What the router file predicts, where it does not say: ar-minus-diffusion or "
    "diffusion-minus-ar.",
    "tree_budget": "Reserved for the tree drafter.",
    "entropy_threshold": "Entropy router: leave the diffusion drafter above this many nats.",
    "min_dwell": "Rounds a request keeps its drafter at least before switching.",
    "eagle_steps": "Length of the EAGLE-3 chain, at most.",
    "block_size": "DFlash block to draft, bonus token included; at most the checkpoint's own.",
    "dflash_vocabulary": "What DFlash drafts from: full, or the reduced vocabulary of the eagle3 checkpoint (cheaper "
    "for small targets). Default: the bundle's, else full.",
    "lookup": "The copying arm: on or off. Default: as the bundle says, else on.",
    "lookup_memory_mib": "MiB of recent outputs to copy from in later requests of the same cache salt and extra key; "
    "0 keeps none. Default: the bundle's, else 0.",
    "backlog_tokens": "Features parked per request for the idle drafter before they are flushed into its KV.",
}


def install() -> None:
    """Add the flags to every launcher. Idempotent."""
    replace(ServerArgs, "add_cli_args", _with_flags)
    replace(ServerArgs, "from_cli_args", _reading_flags)
    replace(Engine, "server_args_class", _engine_arguments)


def _dest(field: str) -> str:
    return flag_of(field)[2:].replace("-", "_")


def _with_flags(original: Any) -> Any:
    add_cli_args = original.__func__ if isinstance(original, staticmethod) else original

    @staticmethod  # type: ignore[misc]
    @wraps(add_cli_args)
    def wrapper(parser: argparse.ArgumentParser) -> None:
        add_cli_args(parser)
        group = parser.add_argument_group(
            "WhiFlash", "with --speculative-algorithm WHIFLASH; --speculative-draft-model-path takes a bundle"
        )
        for field, info in Flags.model_fields.items():
            default = "" if info.default is None else f" Default: {info.default}."
            group.add_argument(flag_of(field), dest=_dest(field), default=None, help=_HELP[field] + default)

    return wrapper


def _reading_flags(original: Any) -> Any:
    @wraps(original.__func__)
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        given = {field: getattr(args, _dest(field), None) for field in Flags.model_fields}
        server_args = original.__func__(cls, args)
        try:
            attach(server_args, given)
        except WhiflashError as error:
            raise SystemExit(f"whiflash: error: {error}") from None
        if hasattr(server_args, "_whiflash"):
            from whiflash_sglang.compat import http  # heavy, and only a launcher serves HTTP

            http.install(server_args)
        return server_args

    return classmethod(from_cli_args)


def _engine_arguments(original: Any) -> Any:
    def build(**kwargs: Any) -> Any:
        given = {field: kwargs.pop(_dest(field), None) for field in Flags.model_fields}
        server_args = original(**kwargs)
        attach(server_args, given)
        return server_args

    return staticmethod(build)


def attach(server_args: Any, given: dict[str, Any]) -> None:
    """Resolve the flags and put the settings on the record, before SGLang's own resolution reads the draft path.

    Raises:
        ConfigError: naming the flag or the file.
    """
    if (server_args.speculative_algorithm or "").upper() != ALGORITHM:
        return
    flags = parse_flags(given)
    path = server_args.speculative_draft_model_path
    local = hub.fetch(path) if path else hub.default_bundle_for(server_args.model_path)
    if flags.eagle_draft:
        flags = flags.model_copy(update={"eagle_draft": str(hub.fetch(flags.eagle_draft))})
    if flags.neural_router_path and not Path(flags.neural_router_path).is_file():
        flags = flags.model_copy(update={"neural_router_path": str(hub.fetch(flags.neural_router_path))})
    settings = resolve(flags, local)
    server_args._whiflash = settings
    # SGLang reads the draft path as a checkpoint before any validator of ours runs.
    server_args.speculative_draft_model_path = str(settings.dflash)
    if server_args.chat_template is None and settings.chat_template is not None:
        server_args.chat_template = str(settings.chat_template)
    if server_args.tool_call_parser is None and settings.tool_call_parser is not None:
        server_args.tool_call_parser = settings.tool_call_parser

"""The part of a launch that travels from the command line to the scheduler: our settings, on SGLang's own record."""

from typing import Any

from whiflash_sglang.settings.config import Settings

ALGORITHM = "WHIFLASH"
META_KEY = "whiflash"
"""Key of an answer's `meta_info` that carries its trace."""

APP_PATH, WORKER_APP = "SGLANG_HTTP_SERVER_APP_PATH", "whiflash_sglang.engine.http_worker:app"
"""Variable that names the application of SGLang's tokenizer workers, and ours."""


def settings_of(server_args: Any) -> Settings:
    """The resolved settings of a launch. They ride on an underscore attribute: SGLang pickles those to its children."""
    settings: Settings = server_args._whiflash
    return settings


def asks_for_ours(server_args: Any) -> bool:
    """Whether a launch asks for this algorithm."""
    return hasattr(server_args, "_whiflash")


def is_ours(scheduler: Any) -> bool:
    """Whether a scheduler of SGLang runs this algorithm: a process may serve another one after ours."""
    return bool(getattr(scheduler.spec_algorithm, "name", "") == ALGORITHM)


def serves_ours() -> bool:
    """Whether the engine of this process, the last one that was started, runs this algorithm."""
    from sglang.srt.runtime_context import get_spec

    return bool(get_spec().speculative_algorithm == ALGORITHM)


def replace_settings(server_args: Any, settings: Settings) -> None:
    """Let this process know that the settings changed while serving."""
    server_args._whiflash = settings

"""Carry our settings on SGLang's `ServerArgs`, from the command line to the scheduler."""

from typing import Any

from whiflash_sglang.settings.config import Settings

ALGORITHM = "WHIFLASH"
META_KEY = "whiflash"
"""Key of an answer's `meta_info` that carries its trace."""

APP_PATH, WORKER_APP = "SGLANG_HTTP_SERVER_APP_PATH", "whiflash_sglang.http.tokenizer_worker:app"
"""Environment variable that names the application of SGLang's tokenizer workers, and the name of ours."""


def settings_of(server_args: Any) -> Settings:
    """Return a launch's resolved settings, an underscore attribute, since SGLang pickles those to child processes."""
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
    """Replace the settings of this process after a change while serving."""
    server_args._whiflash = settings

"""What a launch carries from the command line to the scheduler: our settings, on SGLang's own record."""

from typing import Any

from whiflash_sglang.config import Settings

ALGORITHM = "WHIFLASH"


def settings_of(server_args: Any) -> Settings:
    """The resolved settings of a launch. They ride on an underscore attribute: SGLang pickles those to its children."""
    settings: Settings = server_args._whiflash
    return settings


def is_ours(scheduler: Any) -> bool:
    """Whether a scheduler of SGLang runs this algorithm: hooks are installed whatever is served."""
    return bool(getattr(scheduler.spec_algorithm, "name", "") == ALGORITHM)


def replace_settings(server_args: Any, settings: Settings) -> None:
    """Let this process know that the settings changed while serving."""
    server_args._whiflash = settings

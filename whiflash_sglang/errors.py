"""Errors that a person can act on. Each message names the thing that is wrong and says what to do."""


class WhiflashError(ValueError):
    """Base of everything this package raises on purpose."""


class ConfigError(WhiflashError):
    """A flag, a manifest or a combination of them cannot work."""


class UsageError(ConfigError):
    """An option has a value that it does not take, or does not go with another: the command line ends with 2."""


class CheckpointError(WhiflashError):
    """A drafter or router checkpoint is missing, damaged or does not fit the target."""


class IncompatibleEngineError(WhiflashError):
    """The installed SGLang is not the one this version is written for."""


class ServerRefusedError(WhiflashError):
    """A running server did not do what it was asked, or does not answer; the message names it and says why."""

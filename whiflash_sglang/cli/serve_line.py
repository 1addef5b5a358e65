"""Read the command line of `whiflash serve` without SGLang, and refuse flags, paths and ports that cannot work.

This takes a second, where importing SGLang takes half a minute. Everything else is judged by the started SGLang: its
parser, `settings.config.resolve`, and the table of :mod:`whiflash_sglang.engine.launch.refusals`.
"""

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from whiflash_sglang.checkpoints.hub import check_place
from whiflash_sglang.errors import ConfigError, UsageError
from whiflash_sglang.files.disk import read_yaml
from whiflash_sglang.settings.config import Flags, flag_of, parse_flags

ALGORITHM, DRAFT = "--speculative-algorithm", "--speculative-draft-model-path"
MODEL = ("--model-path", "--model")
PREFIX = "--whiflash-"
HOST, PORT = "127.0.0.1", 30000
"""SGLang's default address."""


@dataclass(frozen=True, slots=True)
class ServeLine:
    """The arguments of `sglang serve`.

    flags: as it reads them, with the model after `--model-path` and `--config FILE` as two words. line: values by flag;
    None for a flag without one. file: values of its configuration file, by flag.
    """

    flags: list[str]
    line: Mapping[str, str | None]
    file: Mapping[str, Any]

    @classmethod
    def read(cls, arguments: list[str]) -> "ServeLine":
        """Read the command line and the file of `--config`. Raises UsageError or ConfigError if that cannot be read."""
        if arguments and not arguments[0].startswith("-"):
            arguments = [MODEL[0], *arguments]
        flags = []
        for argument in arguments:
            name, joined, value = argument.partition("=")
            # SGLang's parser takes unambiguous beginnings: `--model-p` is `--model-path`.
            if name.startswith("--model-p") and MODEL[0].startswith(name):
                argument = MODEL[0] + joined + value
            flags += [name, value] if name == "--config" and joined else [argument]
        line: dict[str, str | None] = {}
        for flag, following in pairwise([*flags, "--"]):
            if flag.startswith("--"):
                name, joined, value = flag.partition("=")
                line[name] = value if joined else None if following.startswith("--") else following
        return cls(flags, line, _configured(line["--config"]) if "--config" in line else {})

    @property
    def values(self) -> dict[str, Any]:
        """Return the value of each flag. The command line overrules the file."""
        return {**self.file, **self.line}

    @property
    def is_embedded(self) -> bool:
        """Whether neither the command line nor the file names a model, so that the embedded one serves."""
        return self.values.keys().isdisjoint(MODEL)

    @property
    def is_ours(self) -> bool:
        """Whether WHIFLASH drafts: nothing names another algorithm."""
        return str(self.values.get(ALGORITHM, "WHIFLASH")).upper() == "WHIFLASH"

    def check(self) -> None:
        """Refuse a launch whose flags of WHIFLASH, paths or port cannot work.

        Raises:
            UsageError: no such flag of WHIFLASH, or a value that it does not take.
            ConfigError: a path that is not there, or a port that is not free.
        """
        values = self.values
        ours = _parse(values)
        # Another algorithm's draft is SGLang's to judge.
        places = {name: values.get(name) for name in (*MODEL, *((DRAFT,) if self.is_ours else ()))}
        places |= {flag_of("eagle_draft"): ours.eagle_draft, flag_of("uno"): ours.uno}
        for name, place in places.items():
            # A model may be called in ways that only SGLang knows, such as a name without an owner.
            if isinstance(place, str) and (name not in MODEL or place.startswith(("/", ".", "~"))):
                try:
                    check_place(place)
                except ConfigError as error:
                    raise ConfigError(f"{name} {error}") from None
        if str(values.get("--node-rank", "0")) == "0":
            _check_port(str(values.get("--host") or HOST), values.get("--port") or PORT)


def _configured(file: str | None) -> dict[str, Any]:
    """Return the flags of SGLang's configuration file with their values."""
    if file is None:
        raise UsageError("--config needs a value: the path of a YAML file")
    try:
        settings = read_yaml(Path(file))
    except ConfigError as error:
        raise ConfigError(f"--config {error}") from None
    if not isinstance(settings or {}, dict):
        raise ConfigError(f"--config {file}: keys and values expected, such as `model-path: OWNER/NAME`")
    return {f"--{str(key).replace('_', '-')}": value for key, value in (settings or {}).items()}


def _parse(values: Mapping[str, Any]) -> Flags:
    """Parse WHIFLASH's flags among all flags of a launch; raises UsageError."""
    fields, given = {flag_of(field): field for field in Flags.model_fields}, {}
    for name, value in values.items():
        if not name.startswith(PREFIX):
            continue
        # SGLang's parser takes unambiguous beginnings of flags.
        meant = [name] if name in fields else [flag for flag in fields if flag.startswith(name)]
        if len(meant) != 1:
            raise UsageError(f"{name!r} is not one of {', '.join(meant or fields)}")
        if value is None:
            raise UsageError(f"{meant[0]} needs a value: give one after it")
        given[fields[meant[0]]] = value
    try:
        return parse_flags(given)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def _check_port(host: str, port: Any) -> None:
    """Raise an error unless a server can listen at this address: SGLang would try it after it has read all weights."""
    if not str(port).isdecimal() or int(port) > 65535:
        raise UsageError(f"--port {port}: give a number from 1 to 65535")
    try:
        families = {family for family, *_ in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)}
        family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
        socket.create_server((host, int(port)), family=family).close()
    except OSError as error:
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
        raise ConfigError(f"--port {port} of {host} {why}: give --port and --host that are free here") from None

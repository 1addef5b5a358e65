"""Judge a launch by its command line only, within a second, before SGLang is imported.

`whiflash serve` does so before it starts SGLang; `sglang serve` and `python -m sglang.launch_server` when they load
plugins. Refusals that need SGLang's defaults or a target's configuration follow later, from the same table.
"""

import errno
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from whiflash_sglang.checkpoints.manifest import MANIFEST, check_router, load_manifest
from whiflash_sglang.engine.launch.refusals import refusals_of
from whiflash_sglang.errors import ConfigError, UsageError, WhiflashError
from whiflash_sglang.files.disk import read_yaml
from whiflash_sglang.formats.uno import adapter_in
from whiflash_sglang.settings.config import Flags, flag_of, parse_flags

ALGORITHM, DRAFT = "--speculative-algorithm", "--speculative-draft-model-path"
MODEL = ("--model-path", "--model")
PREFIX = "--whiflash-"
OTHERS = ("--help", "--model-type")
"""Flags that `sglang serve` reads itself, before its parser."""
KNOWN_PLUGINS = ("whiflash", "smg-servicer", "smg-zmq")
"""Plugins whose flags are known: this one, and SGLang's own, whose packages have them in files `*_flag.py`."""
_FIELD = re.compile(r"^    ([a-z]\w*): ", re.MULTILINE)
_LITERAL = re.compile(r"[\"'](--[a-z][\w-]*)[\"']")
HOST, PORT = "127.0.0.1", 30000
"""SGLang's default address."""


def as_flags(arguments: list[str]) -> list[str]:
    """Return `arguments` as `sglang serve` reads them: the model after `--model-path`, `--config FILE` as two words."""
    if arguments and not arguments[0].startswith("-"):
        arguments = [MODEL[0], *arguments]
    flags = []
    for argument in arguments:
        name, joined, value = argument.partition("=")
        # SGLang's parser takes unambiguous beginnings: `--model-p` is `--model-path`.
        if name.startswith("--model-p") and MODEL[0].startswith(name):
            argument = MODEL[0] + joined + value
        flags += [name, value] if name == "--config" and joined else [argument]
    return flags


def pairs(flags: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each flag with its value: the word after it, or None if another flag or nothing follows."""
    for flag, following in pairwise([*flags, "--"]):
        if flag.startswith("--"):
            name, joined, value = flag.partition("=")
            yield name, value if joined else None if following.startswith("--") else following


def configured(flags: list[str]) -> dict[str, Any]:
    """Return the flags of SGLang's configuration file with their values; empty without a file.

    Raises:
        UsageError, ConfigError: `--config` has no value, or the file cannot be read.
    """
    if "--config" not in flags:
        return {}
    place = flags.index("--config") + 1
    if place == len(flags):
        raise UsageError("--config needs a value: the path of a YAML file")
    path = Path(flags[place])
    try:
        settings = read_yaml(path)
    except ConfigError as error:
        raise ConfigError(f"--config {error}") from None
    if not isinstance(settings or {}, dict):
        raise ConfigError(f"--config {path}: keys and values expected, such as `model-path: OWNER/NAME`")
    return {f"--{str(key).replace('_', '-')}": value for key, value in (settings or {}).items()}


def named(arguments: list[str]) -> bool:
    """Whether these arguments of `sglang serve` ask for WHIFLASH. A `--config` file that cannot be read does not."""
    flags, settings = as_flags(arguments), {}
    with suppress(WhiflashError):
        settings = configured(flags)
    return str((settings | dict(pairs(flags))).get(ALGORITHM)).upper() == "WHIFLASH"


def check(arguments: list[str]) -> None:
    """Refuse a launch that cannot be served, as far as its arguments show. WHIFLASH serves if they name no algorithm.

    Args:
        arguments: as for `sglang serve`.

    Raises:
        UsageError: no such flag of WHIFLASH, or a value that it does not take.
        ConfigError: a path that is not there, a port that is not free, a launch that WHIFLASH refuses.
    """
    flags = as_flags(arguments)
    said: dict[str, Any] = configured(flags) | dict(pairs(flags))
    settings = _settings(said)
    _check_names(said)
    for name in MODEL:
        _check_place(name, said.get(name))
    _check_place(DRAFT, said.get(DRAFT), bundle=True)
    _check_place("--whiflash-eagle-draft", settings.eagle_draft)
    _check_place("--whiflash-uno", settings.uno)
    if str(said.get(ALGORITHM, "WHIFLASH")).upper() == "WHIFLASH":
        _check_bundle(settings, said)
        for _, sentence in refusals_of(_launch(settings, said), known_in_part=True):
            raise ConfigError(sentence)
    if str(said.get("--node-rank", "0")) == "0":
        check_port(str(said.get("--host") or HOST), said.get("--port") or PORT)


def _settings(said: Mapping[str, Any]) -> Flags:
    """Parse WHIFLASH's flags among all flags of a launch; raises UsageError."""
    fields, values = {flag_of(field): field for field in Flags.model_fields}, {}
    for name, value in said.items():
        if not name.startswith(PREFIX):
            continue
        # SGLang's parser takes unambiguous beginnings of flags.
        meant = [name] if name in fields else [flag for flag in fields if flag.startswith(name)]
        if len(meant) != 1:
            raise UsageError(f"{name!r} is not one of {', '.join(meant or fields)}")
        if value is None:
            raise UsageError(f"{meant[0]} needs a value: give one after it")
        values[fields[meant[0]]] = value
    try:
        return parse_flags(values)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def _check_names(said: Iterable[str]) -> None:
    """Raise UsageError for a flag that is not in SGLang's sources. Importing its parser would take half a minute."""
    plugins = entry_points(group="sglang.srt.plugins")
    packages = ["sglang", *(plugin.module.partition(".")[0] for plugin in plugins)]
    specs = [spec for package in packages if (spec := find_spec(package)) is not None]
    places = [Path(place) for spec in specs for place in spec.submodule_search_locations or ()]
    if not places or plugins.names - {*KNOWN_PLUGINS}:  # other plugins may add flags
        return
    root = places[0] / "srt"
    files = [root / "server_args.py", *(root / "arg_groups").rglob("*.py")]
    files += [file for place in places for file in place.glob("*_flag.py")]
    text = "\n".join(file.read_text("utf-8") for file in files if file.is_file())
    known = {*_LITERAL.findall(text), *OTHERS}
    known |= {f"--{name.replace('_', '-')}" for name in _FIELD.findall(text)}
    for name in said if MODEL[0] in known else ():
        plain = f"--{name.removeprefix('--no-')}" if name.startswith("--no-") else name
        if not name.startswith(PREFIX) and not any(flag.startswith(plain) for flag in known):
            near = get_close_matches(name, known, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{name} is no flag of SGLang {version('sglang')}{guess}")


def _check_place(name: str, value: Any, *, bundle: bool = False) -> None:
    """Check that a path exists. A hub id, OWNER/NAME, is left to the hub."""
    if not isinstance(value, str) or Path(os.path.expanduser(value)).exists():
        return
    if value.startswith(("/", ".", "~")):
        raise ConfigError(f"{name} {value}: no such directory")
    if bundle and "/" not in value:
        raise ConfigError(f"{name} {value}: no such directory, and a hub id is OWNER/NAME")


def _check_bundle(settings: Flags, said: Mapping[str, Any]) -> None:
    place = said.get(DRAFT)
    if not isinstance(place, str) or not (path := Path(os.path.expanduser(place))).exists():
        return
    if (path / MANIFEST).is_file():
        manifest = load_manifest(path)
        if settings.router and settings.drafters != "none" and not settings.eagle_draft:
            check_router(settings.router, manifest.drafters)
    elif not ((path / "config.json").is_file() or adapter_in(path)):
        raise ConfigError(
            f"{DRAFT} {place} has neither {MANIFEST} nor config.json: give a bundle or the directory of a drafter"
        )


def _launch(settings: Flags, said: Mapping[str, Any]) -> Any:
    """Return a `Launch` of the facts that the arguments name. Refusals that read another fact are skipped."""
    fields = {name[2:].replace("-", "_"): _value(value) for name, value in said.items()}
    launch = SimpleNamespace(args=SimpleNamespace(**fields), given=fields, model=None, environment=os.environ)
    launch.architecture = "the target"
    launch.is_set = lambda variable: (
        os.environ.get(variable, "").lower() in ("1", "true", "yes", "y", "t", "on")
    )
    drafts = DRAFT in said and not adapter_in(Path(os.path.expanduser(str(said[DRAFT]))))
    if settings.drafters == "none" or settings.eagle_draft or drafts or not said.keys() & set(MODEL):
        launch.draft_kv = settings.drafters != "none"
    return launch


def _value(word: Any) -> Any:
    """Return a flag's value as SGLang's parser reads it: a number or text; True for a switch, which has no word."""
    if not isinstance(word, str):
        return True if word is None else word
    for read in (int, float):
        with suppress(ValueError):
            return read(word)
    return word


def check_port(host: str, port: Any) -> None:
    """Check that a server can listen at this address. Raises UsageError: no such port; ConfigError: it cannot."""
    if not str(port).isdecimal() or int(port) > 65535:
        raise UsageError(f"--port {port}: give a number from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            listening.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port} of {host} is in use: give another one, or end what listens there"
            ) from None
        raise ConfigError(
            f"--host {host}, --port {port}: {error.strerror}; give an address of this machine"
        ) from None

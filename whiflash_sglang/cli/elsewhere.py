"""Commands and checks of other distributions, which are found by their entry points."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer

COMMANDS = "whiflash.commands"
"""Group of entry points: functions that register commands, given the application and its group `lab`."""
CHECKS = "whiflash.checks"
"""Group of entry points: functions that `whiflash check` calls for a part of its work."""
WHOLE = "pip install dist/*.whl (`make wheels`)"
"""Command that installs all packages with SGLang."""
BROUGHT: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "demo": ("lab", ("demo",)),
    "bundle": ("train", ("bundle",)),
    "advise": ("lab", ("advise",)),
    "bench": ("lab", ("bench", "lab replay", "lab simulate")),
    "learn": ("train", ("learn",)),
    "train": ("train", ("train", "lab split", "lab features", "lab export")),
    "judge": ("lab", ("lab evaluate",)),
}
"""Entry points of our own distributions: the extra of whiflash-sglang that brings each, and its commands."""


@cache
def installed(group: str) -> Mapping[str, EntryPoint]:
    """Return the installed entry points of a group, by name."""
    return {point.name: point for point in entry_points(group=group)}


def check_of(name: str) -> Callable[..., Any] | None:
    """Load the check of this name; None if no installed distribution has it."""
    point = installed(CHECKS).get(name)
    return None if point is None else point.load()


def missing(package: str) -> str:
    """Return the message that the distribution `whiflash-{package}` is not installed, and how to install it."""
    return f"whiflash-{package} is not installed: {WHOLE}"


def register(name: str, app: typer.Typer, lab: typer.Typer) -> None:
    """Register an entry point's commands. If it is not installed, its commands say which distribution has them."""
    package, commands = BROUGHT[name]
    reason = missing(package)
    if point := installed(COMMANDS).get(name):
        try:
            point.load()(app, lab)
            return
        except ModuleNotFoundError as error:  # installed without what these commands import
            reason = f"{error.name} is not installed: {WHOLE}"
    for command in commands:
        group, _, last = command.rpartition(" ")
        _stand_in(lab if group else app, last, f"{command}: {reason}")


def register_others(app: typer.Typer, lab: typer.Typer) -> None:
    """Register commands of distributions that are not ours."""
    for name, point in installed(COMMANDS).items():
        if name not in BROUGHT:
            point.load()(app, lab)


def _stand_in(group: typer.Typer, name: str, reason: str) -> None:
    """Register a hidden command that takes any arguments, prints `reason` and exits with code 2."""

    def refuse() -> None:
        typer.echo(f"whiflash: error: {reason}", err=True)
        raise typer.Exit(2)

    takes_any = {"ignore_unknown_options": True, "allow_extra_args": True}
    group.command(name, hidden=True, add_help_option=False, context_settings=takes_any)(refuse)

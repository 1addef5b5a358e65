"""`whiflash drafter`: versions of the drafters' weights, and the one that running servers use."""

from pathlib import Path
from typing import Annotated, Any

import typer

from whiflash_sglang.cli import TRAIN
from whiflash_sglang.cli.options import AdminKeyOption, JsonFlag, UrlOption, report
from whiflash_sglang.cli.running import ask_every, steer
from whiflash_sglang.errors import ConfigError, ServerRefusedError, UsageError

BEFORE = "before"
_PLACE = "Directory of versions: --whiflash-versions, or versions in --whiflash-learn."


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=TRAIN)(drafter)
    lab.command("add-version")(add_version)


def drafter(
    version: Annotated[
        str | None,
        typer.Argument(
            help=f"Number of the version from now on; 0 is that of the start, {BEFORE} the one used before. Without "
            "it, print the version in use."
        ),
    ] = None,
    url: UrlOption = None,
    directory: Annotated[Path | None, typer.Option(help=f"List the versions here instead. {_PLACE}")] = None,
    as_json: JsonFlag = False,
    api_key: AdminKeyOption = None,
) -> None:
    """Switch running servers to another version of the drafters' weights. Running requests keep their text.

    Every server is asked, even if another one failed. The exit code is then 1.

    \b
    Examples:
    whiflash drafter 3 --url http://127.0.0.1:30000
    whiflash drafter before
    whiflash drafter --directory /var/lib/whiflash/versions
    """
    if directory is not None:
        if version is not None or url:
            raise UsageError("--directory lists versions and asks no server: remove VERSION and --url, or it")
        _list(directory, as_json)
        return
    if version is not None and version != BEFORE and not version.isdecimal():
        raise UsageError(f"{version!r} is neither the number of a version nor {BEFORE!r}")

    def ask(server: str) -> int:
        state = steer(server, "/whiflash/state", None, api_key)
        if "drafters" not in state:
            raise ServerRefusedError(f"{server} was started without --whiflash-versions or --whiflash-learn")
        now: dict[str, Any] = state["drafters"]
        if version is not None:
            body = {"version": now["before"] if version == BEFORE else int(version)}
            now = steer(server, "/whiflash/drafters", body, api_key)["drafters"]
        return int(now["version"])

    ask_every(url, ask, as_json)


def _list(directory: Path, as_json: bool) -> None:
    """Print the versions of a directory; a star marks the one that its server used last."""
    from whiflash_sglang.updates.versions import notes_of, numbers, served

    if not directory.is_dir():
        raise ConfigError(f"--directory {directory}: no such directory")
    used = served(directory)
    versions = {str(number): notes_of(directory, number) for number in numbers(directory)}
    if as_json:
        report({"served": used.version, "before": used.before, "versions": versions}, True)
        return
    for number, notes in {"0": {}, **versions}.items():
        facts = ", ".join(f"{key} {value}" for key, value in notes.items() if not isinstance(value, dict))
        typer.echo(f"{'*' if number == str(used.version) else ' '} {number}{'  ' if facts else ''}{facts}")


def add_version(
    bundle: Annotated[Path, typer.Argument(help="Bundle whose drafters become the next version.")],
    directory: Annotated[Path, typer.Argument(help=_PLACE)],
    as_json: JsonFlag = False,
) -> None:
    """Copy the drafters of a bundle into a directory of versions. No server uses them yet.

    \b
    Example:
    whiflash lab add-version my-bundle /var/lib/whiflash/versions
    """
    from whiflash_sglang.updates.versions import publish

    report({"version": publish(directory, bundle)}, as_json)

"""`whiflash drafter`: versions of the drafters' weights, and the one that running servers use."""

from pathlib import Path
from typing import Annotated, Any

import typer

from whiflash_sglang.cli.options import AdminKeyOption, JsonFlag, UrlOption, report
from whiflash_sglang.cli.running import ask_every, steer
from whiflash_sglang.errors import ServerRefusedError

_Directory = Annotated[
    Path, typer.Argument(help="Directory of versions: --whiflash-versions, or versions in --whiflash-learn.")
]


def register(app: typer.Typer) -> None:
    drafter = typer.Typer(help="Versions of the drafters' weights.", no_args_is_help=True)
    app.add_typer(drafter, name="drafter")

    @drafter.callback()
    def _drafter() -> None:
        """Versions of the drafters' weights: list them, add one, switch running servers."""

    @drafter.command(name="list")
    def list_versions(directory: _Directory, as_json: JsonFlag = False) -> None:
        """List the versions of a directory, and which of them its server used last. 0 is that of the start.

        \b
        Example:
        whiflash drafter list /var/lib/whiflash/versions
        """
        from whiflash_sglang.learn.versions import notes_of, numbers, served

        used = served(directory)
        found = {str(number): notes_of(directory, number) for number in numbers(directory)}
        if as_json:
            report({"served": used.version, "before": used.before, "versions": found}, True)
            return
        for number, notes in {"0": {}, **found}.items():
            said = ", ".join(f"{key} {value}" for key, value in notes.items() if not isinstance(value, dict))
            typer.echo(f"{'*' if number == str(used.version) else ' '} {number}{'  ' if said else ''}{said}")

    @drafter.command()
    def add(
        bundle: Annotated[Path, typer.Argument(help="Bundle whose drafters become the next version.")],
        directory: _Directory,
        as_json: JsonFlag = False,
    ) -> None:
        """Copy the drafters of a bundle into a directory of versions. No server uses them yet.

        \b
        Example:
        whiflash drafter add my-bundle /var/lib/whiflash/versions
        """
        from whiflash_sglang.learn.versions import publish

        report({"version": publish(directory, bundle)}, as_json)

    @drafter.command()
    def use(
        version: Annotated[int, typer.Argument(min=0, help="Number of the version; 0 is that of the start.")],
        url: UrlOption = None,
        as_json: JsonFlag = False,
        api_key: AdminKeyOption = None,
    ) -> None:
        """Switch running servers to another version of the weights. Running requests continue, with the same text.

        Every server is asked, even if another one failed. The exit code is then 1.

        \b
        Example:
        whiflash drafter use 3 --url http://127.0.0.1:30000
        """
        _switch(url, api_key, as_json, lambda state: version)

    @drafter.command()
    def rollback(url: UrlOption = None, as_json: JsonFlag = False, api_key: AdminKeyOption = None) -> None:
        """Switch running servers back to the version that each of them used before.

        \b
        Example:
        whiflash drafter rollback --url http://127.0.0.1:30000
        """
        _switch(url, api_key, as_json, lambda state: state["before"])


def _switch(url: list[str] | None, api_key: str | None, as_json: bool, choose: Any) -> None:
    """Have every server use the version that `choose` names, of what its state says of its drafters."""

    def ask(server: str) -> int:
        state = steer(server, "/whiflash/state", None, api_key)
        if "drafters" not in state:
            raise ServerRefusedError(f"{server} was started without --whiflash-versions or --whiflash-learn")
        body = {"version": choose(state["drafters"])}
        return int(steer(server, "/whiflash/drafters", body, api_key)["drafters"]["version"])

    ask_every(url, ask, as_json)

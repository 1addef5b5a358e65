"""Commands to running servers: `whiflash policy` changes their policy, `top` watches them, `report` sums up."""

import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from whiflash_sglang.cli import LOOK, SERVE, options
from whiflash_sglang.cli.options import DEFAULT_URL, AdminKeyOption, JsonFlag, UrlOption
from whiflash_sglang.errors import ConfigError, ServerRefusedError, WhiflashError
from whiflash_sglang.settings.config import RouterName

PATIENCE = 60.0
"""Timeout of an answer in seconds. A server answers between two steps of its scheduler, so it may take long."""


def steer(url: str, path: str, body: dict[str, Any] | None, api_key: str | None) -> dict[str, Any]:
    """POST `body` to the route `path` of the server at `url`, if there is one; return the server's state.

    Raises: ServerRefusedError.
    """
    import httpx

    from whiflash_sglang.files.hosts import ServerState, ask

    with httpx.Client(headers=options.authorization(api_key), timeout=PATIENCE) as client:
        return ask(client, url, "/whiflash/state" if body is None else path, ServerState, body)


def ask_every(urls: list[str] | None, act: Callable[[str], Any], as_json: bool) -> None:
    """Call `act` with the URL of each server, or the default URL, and report the results.

    Raises: WhiflashError with the errors of all servers that refused, after every server was asked.
    """
    from whiflash_sglang.files.hosts import without_password

    results, failed = {}, []
    for address in dict.fromkeys(urls or [DEFAULT_URL]):
        try:
            results[without_password(address)] = act(address)
        except ServerRefusedError as error:
            failed.append(str(error))
    if results:
        options.report(results, as_json)
    if failed:
        raise WhiflashError("; ".join(failed))


def policy(
    router: Annotated[
        RouterName | None,
        typer.Argument(help="Policy from now on; none stops drafting. Without it, print the policy in force."),
    ] = None,
    url: UrlOption = None,
    as_json: JsonFlag = False,
    api_key: AdminKeyOption = None,
) -> None:
    """Change the policy of running servers without a restart. Running requests continue under the new one.

    Every server is asked, even if another one failed. The exit code is then 1.

    \b
    Example:
    whiflash policy none --url http://127.0.0.1:30000
    """
    body = None if router is None else {"router": router}
    ask_every(url, lambda server: str(steer(server, "/whiflash/policy", body, api_key)["policy"]), as_json)


def top(
    url: UrlOption = None,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between readings.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show one reading and end.")] = False,
    as_json: JsonFlag = False,
    api_key: AdminKeyOption = None,
) -> None:
    """Watch servers: tokens a second, drafters and their acceptance, reasons, costs, memory.

    Each figure covers the last interval; totals since the start are in brackets. Ctrl-C ends it. Without a terminal
    it shows one reading; --json prints a line for each reading. The exit code is 1 if no server can be read at the
    first reading, with --once if any cannot.

    \b
    Example:
    whiflash top --url http://127.0.0.1:30000 --url http://127.0.0.1:30001
    """
    import httpx
    from rich.live import Live

    from whiflash_sglang.cli.top import TIMEOUT, LiveView, WatchedServer, screen

    headers = options.authorization(api_key)
    with httpx.Client(headers=headers, timeout=TIMEOUT) as client:
        view = LiveView([WatchedServer(server, client) for server in dict.fromkeys(url or [DEFAULT_URL])])
        console = options.for_tables()
        once = once or not (console.is_terminal or as_json)
        readings = view.look()
        failed = [server["error"] for server in readings if "error" in server]
        if len(failed) == len(readings) or (once and failed):
            if once and as_json:
                typer.echo(json.dumps(readings))
            elif len(failed) < len(readings):
                console.print(screen(readings))
            raise WhiflashError("\n".join(failed))
        if as_json:
            typer.echo(json.dumps(readings))
            while not once:
                time.sleep(interval)
                typer.echo(json.dumps(view.look()))
        elif once:
            console.print(screen(readings))
        else:
            # The terminal's alternate screen, which disappears however the command ends.
            with Live(screen(readings), console=console, screen=True, auto_refresh=False) as live:
                while True:
                    time.sleep(interval)
                    live.update(screen(view.look()), refresh=True)


def summary(url: UrlOption = None, as_json: JsonFlag = False, api_key: AdminKeyOption = None) -> None:
    """Report what drafting brought on running servers, against their own prices of rounds without drafts.

    It counts from the server's start.

    \b
    Example:
    whiflash report --url http://127.0.0.1:30000
    """
    from whiflash_sglang.cli.report import CAVEAT, brought
    from whiflash_sglang.files.hosts import without_password

    def ask(server: str) -> dict[str, Any] | str:
        state = steer(server, "/whiflash/state", None, api_key)
        try:
            figures = brought(state)
        except ConfigError as error:
            raise ServerRefusedError(f"{without_password(server)}: {error}") from None
        return figures if as_json else _sentences(figures)

    ask_every(url, ask, as_json)
    if not as_json:
        options.say_prose(CAVEAT)


def _sentences(sums: dict[str, Any]) -> str:
    from whiflash_sglang.cli.top import unknown

    arms = ", ".join(f"{arm} {count / sums['tokens']:.0%}" for arm, count in sums["tokens_by_arm"].items())
    beside = f"; the gain is {unknown(sums['plain_price'])}"
    if sums["gain"] is not None:
        beside = f" for {sums['plain_tokens_per_second']:.1f} without drafts: {sums['gain']:.2f} times"
    lines = [
        f"{sums['tokens']:,} tokens, {sums['tokens_per_second']:.1f} a second{beside}",
        f"tokens by drafter: {arms}",
    ]
    return "\n  ".join(["", *lines])


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=SERVE)(policy)
    app.command(rich_help_panel=LOOK)(top)
    app.command("report", rich_help_panel=LOOK)(summary)

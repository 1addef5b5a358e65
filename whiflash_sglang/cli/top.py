"""`whiflash top`: what servers do, live."""

import json
import time
from typing import Annotated

import typer

from whiflash_sglang.cli.options import (
    DEFAULT_URL,
    AdminKeyOption,
    JsonFlag,
    UrlOption,
    authorization,
    for_tables,
)
from whiflash_sglang.errors import WhiflashError


def register(app: typer.Typer) -> None:
    @app.command()
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

        from whiflash_sglang.lab.top import TIMEOUT, LiveView, WatchedServer, screen

        headers = authorization(api_key)
        with httpx.Client(headers=headers, timeout=TIMEOUT) as client:
            view = LiveView([WatchedServer(one, client) for one in dict.fromkeys(url or [DEFAULT_URL])])
            console = for_tables()
            once = once or not (console.is_terminal or as_json)
            found = view.look()
            failed = [one["error"] for one in found if "error" in one]
            if len(failed) == len(found) or (once and failed):
                if once and as_json:
                    typer.echo(json.dumps(found))
                elif len(failed) < len(found):
                    console.print(screen(found))
                raise WhiflashError("\n".join(failed))
            if as_json:
                typer.echo(json.dumps(found))
                while not once:
                    time.sleep(interval)
                    typer.echo(json.dumps(view.look()))
            elif once:
                console.print(screen(found))
            else:
                # On a screen of its own, which is gone when it is left, however that happens.
                with Live(screen(found), console=console, screen=True, auto_refresh=False) as live:
                    while True:
                        time.sleep(interval)
                        live.update(screen(view.look()), refresh=True)

"""`whiflash demo`: asks a server on the embedded model two questions."""

import json
from pathlib import Path
from typing import Annotated

import typer

from whiflash_sglang.cli import SERVE
from whiflash_sglang.cli.options import JsonFlag
from whiflash_sglang.settings.config import RouterName


def demo(
    as_json: JsonFlag = False,
    router: Annotated[RouterName, typer.Option(help="Policy to show.")] = "auto",
    log_dir: Annotated[Path | None, typer.Option(help="Keep the servers' logs in this directory.")] = None,
) -> None:
    """Start a server on the embedded model, ask it a chat question and a tool call, and show who drafted what.

    A second server decodes plainly: its answers must be the same, and its speed is the comparison.

    \b
    Example:
    whiflash demo
    """
    from rich.console import Console

    from whiflash_lab.demo import judge, run, show
    from whiflash_sglang.files.progress import progress

    with progress() as bar:
        answers = run(router, log_dir, bar)
    if as_json:
        typer.echo(json.dumps([answer.as_json() for answer in answers], indent=2))
    else:
        show(answers, Console())
    judge(answers)


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=SERVE)(demo)

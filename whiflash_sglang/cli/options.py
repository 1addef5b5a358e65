"""Shared parts of several commands: options that mean one thing everywhere, and the form of a result."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

JsonFlag = Annotated[bool, typer.Option("--json", help="Print only the result, as JSON.")]
DEFAULT_URL = "http://127.0.0.1:30000"
UrlOption = Annotated[
    list[str] | None,
    typer.Option("--url", help=f"Server; may be repeated. Default: {DEFAULT_URL}.", show_default=False),
]
AdminKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="WHIFLASH_API_KEY",
        help="The server's admin key, or its API key if it has no other. Prefer WHIFLASH_API_KEY, which other "
        "users cannot read.",
        show_default=False,
    ),
]
Dtype = Literal["bfloat16", "float32"]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write the result to this file, as JSON.")]


def report(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result: one JSON object, or a line for each of its keys."""
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in result.items():
        say(f"{key}: {value}")


def say(text: str) -> None:
    """Print text that others may have written: nothing in it steers a terminal."""
    from whiflash_sdk.render.aligned import printable

    typer.echo(printable(text))


def authorization(api_key: str | None) -> dict[str, str]:
    """Headers of a request with this key; none without one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def for_tables() -> "Console":
    """Stdout, wide enough: a file or a pipe has no width of its own, and 80 columns would cut figures off."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=200)

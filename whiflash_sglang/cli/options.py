"""Shared parts of the commands: their common options, and functions that print results."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from whiflash_sglang.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

JsonFlag = Annotated[bool, typer.Option("--json", help="Print only the result, as JSON.")]
MOST = 1 << 24
"""Largest number of tokens, prompts or answers that an option takes."""
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
    """Print a result: as one JSON object, or in a line for each of its keys."""
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in result.items():
        say(f"{key}: {value}")


def say(text: str) -> None:
    """Print text that others may have written; control characters are replaced, so that none reaches the terminal."""
    from whiflash_sdk.render.aligned import printable

    typer.echo(printable(text))


def say_prose(text: str, indent: str = "") -> None:
    """Print a paragraph, wrapped to the terminal's width without breaking words."""
    from textwrap import wrap

    from whiflash_sdk.render.aligned import printable

    width = for_tables().width - len(indent)
    for line in wrap(printable(text), width, break_long_words=False, break_on_hyphens=False):
        typer.echo(indent + line)


def authorization(api_key: str | None) -> dict[str, str]:
    """Return the headers of a request with this key; empty without a key. UsageError if a header cannot hold it."""
    key = (api_key or "").strip()  # a key read from a file ends with a newline
    if not (key.isascii() and key.isprintable()):
        raise UsageError("--api-key, WHIFLASH_API_KEY: a key has printable ASCII characters only")
    return {"Authorization": f"Bearer {key}"} if key else {}


def for_tables() -> "Console":
    """Return a console on stdout. A file or pipe has the columns that COLUMNS says, else 200: 80 would cut figures."""
    from rich.console import Console

    terminal = Console()
    has_width = terminal.is_terminal or os.environ.get("COLUMNS", "").isdecimal()
    return terminal if has_width else Console(width=200)


def show_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", console: "Console | None" = None
) -> None:
    """Print a table. Columns that do not fit into the terminal follow in a second table, with the first column."""
    from rich.table import Table
    from rich.text import Text
    from whiflash_sdk.render.aligned import printable

    console = console or for_tables()
    ends = accumulate(max(map(len, column)) + 2 for column in zip(header, *rows, strict=True))
    fit = max(sum(end - 2 <= console.width for end in ends), 2)
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left", header_style="dim")
    for name in header[:fit]:
        table.add_column(Text(printable(name)), justify="right" if table.columns else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row[:fit]))
    console.print(table)
    if fit < len(header):
        show_table([header[0], *header[fit:]], [[row[0], *row[fit:]] for row in rows], "", console)


def make_place(option: str, file: Path | None) -> None:
    """Create the directory of a file that a command writes at its end, perhaps after hours. Raises ConfigError now if
    the file cannot be written."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file if file.exists() and not file.is_file() else file.parent
    if file.is_dir() or not os.access(written, os.W_OK):
        raise ConfigError(f"{option} {file} is a directory, or cannot be written: give another file")


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse numbers from 1 to 4,096, separated by commas. Raises UsageError."""
    with suppress(ValueError):
        numbers = tuple(map(int, text.split(",")))
        if min(numbers) > 0 and max(numbers) <= 4096:
            return numbers
    raise UsageError(f"{option} {text}: takes whole numbers from 1 to 4,096, such as 1,8,64")

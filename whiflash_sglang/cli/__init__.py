"""The `whiflash` command.

Modules of this package import what they need when they are called: help and errors come without torch and SGLang.
"""

import os
import signal
import sys
import traceback
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import Annotated

import typer

from whiflash_sglang.errors import WhiflashError

DEBUG = "WHIFLASH_DEBUG"
"""Environment variable: with any value, an error comes with its traceback."""
INTERRUPTED = 130

app = typer.Typer(
    name="whiflash",
    help="Token-level switching between speculative drafters, for stock SGLang.",
    epilog=f"Exit codes: 0 done, 1 failed, 2 wrong command line, {INTERRUPTED} interrupted. {DEBUG}=1 shows "
    "tracebacks, NO_COLOR=1 leaves colours out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"whiflash {version('whiflash-sglang')} (sglang {version('sglang')})")
        raise typer.Exit


@app.callback()
def _whiflash(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    pass


for _command in (
    "check",
    "bundle",
    "serve",
    "demo",
    "bench",
    "policy",
    "profile",
    "top",
    "trace",
    "lookup",
    "train",
    "judge",
):
    import_module(f"whiflash_sglang.cli.{_command}").register(app)


def main() -> None:
    """Run the command line and end the process with its exit code; errors that a person can act on are one line."""
    # Engine and torch warn about accelerators they look for; here that is noise around the answer.
    warnings.simplefilter("ignore")
    # A terminated command still ends the servers that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        # Typer returns an exit code that was raised, also for Ctrl-C; commands themselves return None.
        code = app(standalone_mode=False)
    except typer.TyperException as error:  # a wrong command line
        context = getattr(error, "ctx", None)
        more = "" if context is None else f" (see {context.command_path} --help)"
        code = _complain(f"{error.format_message().rstrip('.')}{more}", error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except WhiflashError as error:
        code = _complain(str(error), 1)
    except OSError as error:
        code = _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    typer.echo(f"whiflash: error: {message}", err=True)
    return code

"""The `whiflash` command: commands of this package, and those of other distributions that are installed."""

import os
import re
import signal
import sys
import traceback
import warnings
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from typing import Annotated

import typer
from typer.core import TyperOption

from whiflash_sglang.cli import MORE, elsewhere
from whiflash_sglang.engine.supported import installed
from whiflash_sglang.errors import UsageError, WhiflashError

DEBUG = "WHIFLASH_DEBUG"
"""Environment variable: with any value, an error is shown with its traceback."""
INTERRUPTED = 130
_NOT_AMONG = re.compile(r"(?:Value error, )?('([^'\n]*)' is not one of (.+))", re.DOTALL)

_type_of = TyperOption.display_type_rich
# Typer writes <bool> behind a switch, as if it took a value.
TyperOption.display_type_rich = lambda self, ctx: None if self.is_flag else _type_of(self, ctx)  # type: ignore[method-assign]

app = typer.Typer(
    name="whiflash",
    help="Speculative decoding with several drafters, chosen for every request and round, for stock SGLang.",
    epilog=f"Exit codes: 0 done, 1 failed, 2 wrong command line, {INTERRUPTED} interrupted. {DEBUG}=1 shows "
    "tracebacks, NO_COLOR=1 leaves colours out.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"whiflash {version('whiflash-sglang')} (sglang {installed() or 'not installed'})")
        raise typer.Exit


@app.callback()
def _whiflash(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    pass


lab = typer.Typer(
    help="Commands that few need: simulations, judges of a bundle, parts of a training.", no_args_is_help=True
)

MODULES = (*("serve", "demo", "bundle", "check", "running", "trace"), *("advise", "bench", "learn", "train", "judge"))
"""Modules of this package and entry points of others (`elsewhere.py`), in the order of the help."""

for _name in MODULES:
    if _name in elsewhere.BROUGHT:
        elsewhere.register(_name, app, lab)
    else:
        import_module(f"whiflash_sglang.cli.{_name}").register(app, lab)
elsewhere.register_others(app, lab)
app.add_typer(lab, name="lab", rich_help_panel=MORE)


def main() -> None:
    """Run the command line and end the process with its exit code; errors that a person can act on are one line."""
    # The engine and torch warn about accelerators that they do not find, which says nothing about the command's result.
    warnings.simplefilter("ignore")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # stdout's encoding may lack a client's characters
    # A terminated command must still end the servers that it started; one under nohup ignores the hang-up.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        # Typer returns the code of a `typer.Exit`, also for Ctrl-C; commands themselves return None.
        code = app(standalone_mode=False)
    except typer.TyperException as error:  # a wrong command line
        context = getattr(error, "ctx", None)
        more = "" if context is None else f" (see {context.command_path} --help)"
        message, code = error.format_message().rstrip("."), error.exit_code
        if message:  # empty for a group without a command, whose help is printed
            _complain(f"{_with_guess(message)}{more}", code)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except UsageError as error:
        code = _complain(f"{_with_guess(str(error))} (see whiflash {sys.argv[1]} --help)", 2)
    except WhiflashError as error:
        code = _complain(str(error), 1)
    except ImportError as error:
        if "socks" in str(error):
            code = _complain(f"the environment names a SOCKS proxy: {error}", 1)
        elif installed() is None:
            code = _complain(f"this command needs {error.name or error}, which is not installed: {elsewhere.WHOLE}", 1)
        else:
            raise
    except OSError as error:
        code = _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    sys.exit(code)


def _with_guess(message: str) -> str:
    """Return `message`; if it says that a value is not one of some choices, the nearest choice is added."""
    match = _NOT_AMONG.search(message)
    if match is None:
        return message
    near = get_close_matches(match[2], re.findall(r"[^\s',]+", match[3]), n=1)
    return message[: match.start()] + match[1] + (f"; did you mean {near[0]}?" if near else "")


def _complain(message: str, code: int) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    from whiflash_sdk.render.aligned import printable

    typer.echo(printable(f"whiflash: error: {message}"), err=True)
    return code

"""The `whiflash` command."""

import signal
import sys
import warnings
from importlib import import_module

import typer

from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.train.cli import train_app
from whiflash_sglang.train.judging_cli import calibrate_command, evaluate_command

app = typer.Typer(
    name="whiflash",
    help="Token-level switching between speculative drafters, for stock SGLang.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)

for _command in ("check", "serve", "demo", "bench", "profile", "trace", "lookup"):
    import_module(f"whiflash_sglang.cli.{_command}").register(app)
app.add_typer(train_app, name="train")
app.command("calibrate")(calibrate_command)
app.command("evaluate")(evaluate_command)


def main() -> None:
    """Run the command line; errors made on purpose end as one line, Ctrl-C as exit code 130."""
    # Engine and torch warn about accelerators they look for; here that is noise around the answer.
    warnings.simplefilter("ignore")
    # A terminated command still ends the servers that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app(standalone_mode=False)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except WhiflashError as error:
        typer.echo(f"whiflash: error: {error}", err=True)
        sys.exit(1)
    except Exception as error:
        from click import ClickException

        if not isinstance(error, ClickException):
            raise
        error.show()
        sys.exit(error.exit_code)

"""`whiflash serve`: `sglang serve` with the embedded bundle as default."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.cli import SERVE
from whiflash_sglang.embedded import STRICT_TOOLS, embedded_arguments
from whiflash_sglang.engine.launch.early import (
    ALGORITHM,
    DRAFT,
    HOST,
    MODEL,
    PORT,
    as_flags,
    check,
    configured,
    named,
    pairs,
)

LANGUAGE_MODEL = ("--model-type", "llm")
"""Argument that keeps `sglang serve` from asking the hub whether the model is a diffusion model."""


def server_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments for `sglang serve`. The embedded target and WHIFLASH are added if neither the command line
    nor the file of its `--config` names others. A model as first argument is read as `sglang serve` reads it.

    Raises:
        ConfigError: the file of `--config` cannot be read.
    """
    names = _names(arguments)
    added = embedded_arguments(names) if is_embedded(arguments) else []
    if ALGORITHM not in names:
        added += [ALGORITHM, "WHIFLASH"]
    flags = as_flags(arguments)
    settings = configured(flags)
    if is_embedded(arguments) and DRAFT not in names and named([*added, *flags]):
        added += [DRAFT, str(embedded_bundle())]
    if not any(name in MODEL for name, _ in pairs(flags)):
        # `sglang serve` looks for the model on the command line only.
        added += [word for key in MODEL if key in settings for word in (MODEL[0], str(settings[key]))]
    return [*added, *flags]


def server_environment(arguments: list[str]) -> dict[str, str]:
    """Environment variables to set unless the user has: the embedded target needs a grammar for valid arguments."""
    return STRICT_TOOLS if is_embedded(arguments) else {}


def is_embedded(arguments: list[str]) -> bool:
    """Whether neither the command line nor the configuration file names a model, so that the embedded one serves."""
    return _names(arguments).isdisjoint(MODEL)


def _url(arguments: list[str]) -> str:
    flags = as_flags(arguments)
    settings = configured(flags) | dict(pairs(flags))
    host = str(settings.get("--host") or HOST)
    host = HOST if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http{'s' if settings.get('--ssl-certfile') else ''}://{host}:{settings.get('--port') or PORT}"


def _names(arguments: list[str]) -> set[str]:
    """Return the names of the flags on the command line and in the file of `--config`."""
    flags = as_flags(arguments)
    return {name for name, _ in pairs(flags)} | configured(flags).keys()


class ServeCommand(TyperCommand):
    """Command whose help also shows the flags that WHIFLASH adds to `sglang serve`."""

    def format_help(self, *arguments: Any) -> None:
        super().format_help(*arguments)
        from rich.console import Console
        from rich.padding import Padding

        from whiflash_sglang.settings.flags import flags

        console = Console(highlight=False)
        console.print("Flags of WHIFLASH, beside those of `sglang serve`:\n", markup=False)
        for flag in flags():
            console.print(f"  {flag.name} {flag.takes}", markup=False, style="bold", soft_wrap=True)
            console.print(Padding(flag.meaning, (0, 0, 0, 6)), markup=False)


def serve(
    ctx: typer.Context,
    print_only: Annotated[
        bool, typer.Option("--print-command", help="Print the command, quoted for a shell, and exit.")
    ] = False,
) -> None:
    """Serve with WHIFLASH. All other options go to `sglang serve` unchanged.

    Without a model, here or in the file of --config, it serves the embedded SmolLM2-135M-Instruct with its
    drafters, compact JSON, and tools held to their schemas.

    \b
    Examples:
    whiflash serve --port 30000
    whiflash serve Qwen/Qwen3-8B --speculative-draft-model-path OWNER/BUNDLE --whiflash-router ar
    """
    check(ctx.args)
    url = _url(ctx.args)
    # `sglang` is installed in the same environment as this command.
    command = [
        str(Path(sys.executable).with_name("sglang")),
        "serve",
        *LANGUAGE_MODEL,
        *server_arguments(ctx.args),
    ]
    environment = {name: os.environ.get(name, value) for name, value in server_environment(ctx.args).items()}
    if print_only:
        variables = [f"{name}={value}" for name, value in environment.items()]
        typer.echo(shlex.join([*(["env", *variables] if variables else []), *command]))
        return
    typer.echo(
        f"whiflash: will serve at {url}, after about a minute and any download. Then, in another shell: "
        f"`whiflash top --url {url}` watches it, `whiflash policy none --url {url}` stops drafting",
        err=True,
    )
    # Replacing this process leaves signals, exit code and children to SGLang itself.
    os.execve(command[0], command, {**os.environ, **environment})


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(
        cls=ServeCommand,
        rich_help_panel=SERVE,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        options_metavar="[MODEL] [OPTIONS OF SGLANG SERVE]",
    )(serve)
